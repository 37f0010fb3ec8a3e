"use strict";
(() => {
  const tip = document.getElementById("tip");

  // Text from files goes in as text nodes only, never as HTML.
  const fill = (text) => {
    tip.replaceChildren();
    text.split("\n").forEach((row, place) => {
      const [name, value] = row.split("\t");
      const line = document.createElement(place ? "span" : "strong");
      line.append(name);
      if (value !== undefined) {
        const figure = document.createElement("b");
        figure.append(value);
        line.append(figure);
      }
      tip.append(line);
    });
  };

  const show = (text, box) => {
    fill(text);
    tip.classList.add("on");
    const page = document.documentElement;
    const room = page.clientWidth - tip.offsetWidth - 8;
    const left = Math.max(8, Math.min(box.right + 12 > room ? box.left - tip.offsetWidth - 12 : box.right + 12, room));
    const top = Math.max(8, Math.min(box.top - 8, page.clientHeight - tip.offsetHeight - 8));
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${top + window.scrollY}px`;
  };
  const hide = () => {
    tip.classList.remove("on");
    document.querySelectorAll(".cursor.on").forEach((cursor) => cursor.classList.remove("on"));
  };

  document.querySelectorAll("[data-tip]").forEach((point) => {
    const tell = () => show(point.dataset.tip, point.querySelector(".dot").getBoundingClientRect());
    point.addEventListener("pointerenter", tell);
    point.addEventListener("focus", tell);
    point.addEventListener("pointerleave", hide);
    point.addEventListener("blur", hide);
  });

  // Places and words of a map's cells: those of the table beneath it.
  const cells = (chart) => {
    const { table, unit, least } = chart.dataset;
    const [left, top, across, down, gap, apart] = chart.dataset.grid.split(" ").map(Number);
    const { tHead, tBodies } = document.getElementById(table);
    return [...tBodies[0].rows].flatMap((line, row) => [...line.cells].slice(1).flatMap((cell, column) => {
      const [x, y] = [left + across * (column + 0.5) + (column < apart ? 0 : gap), top + down * (row + 0.5)];
      const name = `${line.cells[0].textContent}\n${tHead.rows[0].cells[column + 1].textContent}`;
      return Number(cell.textContent) < Number(least) ? [] : [[x, y, `${name}\t${cell.textContent}${unit}`]];
    }));
  };

  // Of a narrow chart the places are its own, and the words those of the wide one.
  const words = (chart) => {
    const places = chart.dataset.places.split(" ").map(Number);
    const { told } = (document.getElementById(chart.dataset.of) ?? chart).dataset;
    return told.split("\n\n").map((text, at) => [places[2 * at], places[2 * at + 1], text]);
  };

  document.querySelectorAll("svg[data-track], svg[data-grid], svg[data-places]").forEach((chart) => {
    const { track: given, grid } = chart.dataset;
    const track = given ? JSON.parse(given) : grid ? cells(chart) : words(chart);
    const cursor = chart.querySelector(".cursor");
    const [rule, dot] = cursor.children;
    let at = track.length - 1;
    if (at < 0) return;
    const curve = chart.classList.contains("curve");
    const read = (place) => {
      at = Math.max(0, Math.min(place, track.length - 1));
      const [x, y, text] = track[at];
      rule.setAttribute("x1", x);
      rule.setAttribute("x2", x);
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y);
      cursor.classList.add("on");
      show(text, dot.getBoundingClientRect());
    };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const scale = chart.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      const y = (event.clientY - box.top) * scale;
      let best = 0;
      let least = Infinity;
      track.forEach(([px, py], place) => {
        const far = Math.abs(px - x) * (curve ? 4 : 1) + Math.abs(py - y);
        if (far < least) [best, least] = [place, far];
      });
      read(best);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("focus", () => read(at));
    chart.addEventListener("keydown", (event) => {
      const updown = curve ? {} : { ArrowUp: at - 1, ArrowDown: at + 1 };
      const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: track.length - 1, ...updown }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      read(move);
    });
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
  window.addEventListener("beforeprint", () => {
    hide();
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
  });
})();

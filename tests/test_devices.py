"""Accelerators, by fakes: the one memory-error detector, the meters, sums without float64, default devices."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftwerk import devices
from graftwerk.evaluation.peak_memory import peak_memory, resident
from graftwerk.evaluation.sampling import OwnDraws
from graftwerk.kernels.lm_head import LabelledLogits
from graftwerk.methods.registry import parse_method
from graftwerk.modeling.attach import attach
from graftwerk.tasks.causal import Causal
from graftwerk.training.oom import describe_memory
from tests.families import FAMILIES
from tests.training.test_trainer import Bench, losses

SRC = Path(__file__).parents[1] / "src" / "graftwerk"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "text",
    [
        CUBLAS,
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "HIP error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.9 GiB, max allowed: 18.1 GiB). Tried to allocate 512 MiB",
        "Invalid buffer size: 14.53 GiB",
        "XPU out of memory. Tried to allocate 2.00 GiB",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_is_out_of_memory_error_of_a_library_is_recognised(text: str) -> None:
    assert devices.is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("out of memory"),
    ],
)
def test_is_out_of_memory_other_error_is_not(error: Exception) -> None:
    assert not devices.is_out_of_memory(error)


def test_memory_errors_have_one_detector() -> None:
    """No other file of the package compares the texts of memory errors."""
    texts = {"out of memory", "can't allocate memory", "status_alloc_failed", "memory"}
    found = [
        path.name
        for path in sorted(SRC.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and node.left.value in texts
        if any(isinstance(one, ast.Call) for one in node.comparators)
    ]
    assert found == []


def test_labelled_tokens_out_of_memory_on_the_first_pass_keeps_the_lean_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build(classifier=False)
    attach(model, parse_method("lora"))
    batch = {**FAMILIES["llama"].batch(padded=False)}
    batch["labels"] = batch["input_ids"].clone()
    forward = type(model.model).forward

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(CUBLAS)

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(RuntimeError, match="CUBLAS"):
        Causal().objective.forward(model, batch)
    monkeypatch.setattr(type(model.model), "forward", forward)
    assert isinstance(Causal().objective.forward(model, batch), LabelledLogits)


# -- a fake accelerator ------------------------------------------------------------------------------------------------


class FakeBackend:
    """torch.cuda's interface over two devices whose allocations a test writes down."""

    def __init__(self) -> None:
        self.kind = ""
        self.held, self.peaks, self.calls = [0, 0], [0, 0], Counter[str]()

    def hold(self, first: int, second: int) -> None:
        self.held = [first, second]
        self.peaks = [max(pair) for pair in zip(self.peaks, self.held, strict=True)]

    def device_count(self) -> int:
        return 2

    def memory_allocated(self, index: Any) -> int:
        return self.held[getattr(index, "index", index) or 0]

    def max_memory_allocated(self, index: int) -> int:
        return self.peaks[index]

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peaks[index] = self.held[index]

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return 2**30, 8 * 2**30

    def get_device_name(self, index: int = 0) -> str:
        return f"Fake {index}"

    def empty_cache(self) -> None:
        self.calls["empty_cache"] += 1

    def synchronize(self, *device: torch.device) -> None:
        self.calls[f"synchronize {[str(one) for one in device]}"] += 1


@pytest.fixture(params=["cuda", "xpu"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = FakeBackend()
    found.kind = request.param
    for name in vars(FakeBackend).keys() - vars(object).keys() - {"hold"}:
        if not name.startswith("_"):
            monkeypatch.setattr(getattr(torch, request.param), name, getattr(found, name), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(request.param, 0))
    yield found
    monkeypatch.undo()  # before pytest-randomly seeds what it takes for a device


def test_devices_accelerator_is_found_waited_for_and_emptied_through_its_own_module(fake: Any) -> None:
    assert devices.best_device() == torch.device(fake.kind)
    assert devices.device_names() == ["Fake 0", "Fake 1"]
    devices.release()
    devices.synchronize([torch.device("cpu"), torch.device(fake.kind, 1)])
    assert fake.calls == {"empty_cache": 1, f"synchronize ['{fake.kind}:1']": 1}
    assert describe_memory(torch.device(fake.kind, 0)) == f"0.0 GiB in use, 1.0 of 8.0 GiB free on {fake.kind}:0"


def test_devices_mps_is_emptied_and_waited_for_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps", 0))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: calls.append("wait"))
    devices.release()
    devices.synchronize([torch.device("mps", 0)])
    assert calls == ["empty", "wait"]
    assert devices.best_device() == torch.device("mps")


def test_peak_memory_counts_all_devices_and_nested_blocks_leave_the_outer_peak(fake: Any) -> None:
    fake.hold(100, 10)
    assert resident() == 110
    with peak_memory() as outer:
        fake.hold(900, 10)
        fake.hold(200, 50)
        with peak_memory(device=f"{fake.kind}:0") as inner:
            fake.hold(300, 350)
            fake.hold(200, 20)
        with peak_memory(device="cpu"):  # another kind: neither hears of the other
            fake.hold(200, 400)
    assert inner.bytes == (300 + 350) - 250
    assert outer.bytes == (900 + 400) - 110
    assert inner.how == f"torch.{fake.kind}.max_memory_allocated"


def test_peak_memory_on_mps_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 400, 900, 200] + 1000 * [200])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(held))
    with peak_memory(device="mps") as peak:
        pass
    assert peak.bytes is not None
    assert 300 <= peak.bytes <= 800
    assert "torch.mps" in peak.how


# -- float64 -----------------------------------------------------------------------------------------------------------


class WithoutDoubles(torch.utils._python_dispatch.TorchDispatchMode):
    """A device without float64: whatever makes a tensor of it there fails. "There" is where `held` says."""

    def __init__(self, is_there: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.is_there = is_there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64 and self.is_there(out):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return out


def test_per_row_outputs_sums_in_float64_on_the_cpu_alone() -> None:
    """Before the first copy to the CPU, nothing is in float64."""
    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.long),
        "labels": torch.tensor([[5, 6, 7, 8], [-100, -100, 3, 4]]),
    }
    logits = torch.randn(5, 16)  # of the labelled positions
    copied: list[torch.dtype] = []
    cpu = Tensor.cpu

    def note(tensor: Tensor) -> Tensor:
        copied.append(tensor.dtype)
        return cpu(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", note)
        with WithoutDoubles(lambda tensor: not copied):
            told = Causal().objective.per_row_outputs(SimpleNamespace(logits=logits), batch)
    assert set(copied) == {torch.bool, torch.float32}
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor([6, 7, 8, 3, 4]), reduction="none").double()
    torch.testing.assert_close(told[:, 0], torch.stack([nll[:3].sum(), nll[3:].sum()]), rtol=0, atol=1e-9)
    assert told[:, 1].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "fp64", "wanted"),
    [
        ("mps", None, torch.float32),
        ("xpu", False, torch.float32),
        ("xpu", True, torch.float64),
        ("cuda", None, torch.float64),
    ],
)
def test_sum_dtype_is_what_the_device_has(
    kind: str, fp64: bool | None, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=fp64))
    assert devices.sum_dtype(torch.device(kind)) == wanted


def test_own_draws_without_float64_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwerk.evaluation import sampling

    scores = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))

    def drawn() -> Tensor:
        streams: list[Any] = [SimpleNamespace(random=iter([0.05 + row / 9]).__next__) for row in range(8)]
        return OwnDraws(streams, top_p=0.9)(torch.zeros(8, 1), scores)

    exact = drawn()
    monkeypatch.setattr(sampling, "sum_dtype", lambda device: torch.float32)
    with WithoutDoubles(lambda tensor: True):
        assert torch.equal(drawn(), exact)


# -- default devices ---------------------------------------------------------------------------------------------------

FACTORIES = {
    "Generator", "arange", "as_tensor", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
WHERE_THE_DEFAULT_SAYS = {
    "methods",  # initial values of parameters: made on the default device, moved to their layer by `attach`
    "modeling/prefix_start.py",  # the same: the initial keys and values of a prefix
}


def test_tensors_and_generators_name_their_device() -> None:
    """`torch.set_default_device("cuda")` must not move half of the tensors that a CPU generator fills."""
    unnamed = []
    for path in sorted(SRC.rglob("*.py")):
        relative = path.relative_to(SRC).as_posix()
        exempt = any(relative.startswith(one) for one in WHERE_THE_DEFAULT_SAYS)
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.") in FACTORIES):
                continue
            names = {keyword.arg for keyword in node.keywords}
            made = ast.unparse(node.func)
            named = bool(names & {"device", None}) or (made == "torch.Generator" and node.args)
            if (
                made.startswith("torch.")
                and not named
                and (not exempt or "generator" in names or made == "torch.Generator")
            ):
                unnamed.append(f"{relative}:{node.lineno} {made}")
    assert unnamed == []


@pytest.mark.parametrize("method", [{"name": "lora", "lora_dropout": 0.1}, "prompt"])
def test_fit_with_another_default_device_trains_the_same(method: Any, tmp_path: Path) -> None:
    """Meta stands for any other device: what is made there by mistake has no values, and fails or changes losses."""
    found = []
    for device in ("cpu", "meta"):
        trainer = Bench().trainer(tmp_path / device, method=method, max_steps=2, eval_steps=2)
        with torch.device(device):
            found.append(losses(trainer))
    assert found[0] == found[1]

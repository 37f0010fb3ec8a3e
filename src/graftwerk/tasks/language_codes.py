"""Languages: how multilingual tokenizers mark them, and what people call them.

Three ways to tell a model which language it is to write:

- ``first``: the decoder's first token is the language (mBART-50, M2M100, NLLB); it is forced in generation.
- ``start``: the decoder *starts* from the language in place of its usual start token (mBART-25, old NLLB).
- ``source``: a token like ``>>fra<<`` stands before the source text (Marian models of several target languages).

All others are told in words ("translate German to English: "), or know one pair only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graftwerk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = Literal["first", "start", "source"]


@dataclass(frozen=True)
class LanguageCodes:
    """The languages of a tokenizer.

    Attributes:
        ids: Token id of each code that it knows.
        place: Where the language to write is marked.
    """

    ids: dict[str, int]
    place: Place

    @property
    def both(self) -> bool:
        """Return True if the language of the source is marked as well as that of the target."""
        return self.place != "source"


_NLLB = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_MARIAN = re.compile(r">>([^<>]+)<<")


def codes_of(tokenizer: PreTrainedTokenizerBase) -> LanguageCodes | None:
    """Return the language codes of a tokenizer, or None if it has none: languages are named in words, or not at all."""
    marked = getattr(tokenizer, "supported_language_codes", None)
    if marked is not None:  # Marian: the tokens are plain pieces of its vocabulary
        ids = {match[1]: tokenizer.convert_tokens_to_ids(token) for token in marked if (match := _MARIAN.match(token))}
        return LanguageCodes(ids, "source") if ids else None
    if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        return None
    known = getattr(tokenizer, "lang_code_to_id", None)
    if known is None:  # NLLB keeps no table; its codes are special tokens
        special = [str(token) for token in tokenizer.all_special_tokens]
        known = {token: tokenizer.convert_tokens_to_ids(token) for token in special if _NLLB.fullmatch(token)}
    ids = {code: int(number) for code, number in known.items() if number not in (None, tokenizer.unk_token_id)}
    return LanguageCodes(ids, _place(tokenizer, next(iter(ids)))) if ids else None


def _place(tokenizer: PreTrainedTokenizerBase, code: str) -> Place:
    """Ask the tokenizer itself whether a target begins with its language or ends with it."""
    with language_context(tokenizer, code, code):
        target = tokenizer(text_target="a")["input_ids"]
    return "start" if target[-1] != tokenizer.eos_token_id else "first"


@contextmanager
def language_context(tokenizer: PreTrainedTokenizerBase, source: str, target: str) -> Iterator[None]:
    """Set the tokenizer's source and target language inside the block, and restore them afterwards."""
    before = tokenizer.src_lang, tokenizer.tgt_lang
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    try:
        yield
    finally:
        tokenizer.src_lang, tokenizer.tgt_lang = before


def check_code(code: str, codes: LanguageCodes, *, setting: str, given: bool, where: str) -> None:
    """Check that a tokenizer knows a language code.

    Args:
        code: The code.
        codes: The tokenizer's codes.
        setting: ``source_lang`` or ``target_lang``.
        given: True if the code is a setting of the run file, False if it is from a row.
        where: Place of the row, for messages.

    Raises:
        ConfigError, DataError: The tokenizer does not know the code; the message lists those it knows.
    """
    if code in codes.ids:
        return
    near = _near(code, codes)
    hint = f"did you mean `{near}`? " if near else ""
    said = f"the tokenizer has no language `{code}`"
    hint = f"{hint}It has: {', '.join(codes.ids)}"
    if given:
        raise ConfigError(said, where=f"task.{setting}", hint=hint)
    raise DataError(said, where=f"`{setting}` of {where}", hint=hint)


def _near(code: str, codes: LanguageCodes) -> str | None:
    """Return the code of the same language (`de_DE` for `de` or `German`), else the one spelt most like it."""
    name = language_name(code)
    if name is not None:
        for other in codes.ids:
            if language_name(other) == name:
                return other
    return next(iter(difflib.get_close_matches(code, codes.ids, n=1)), None)


def language_name(code: str) -> str | None:
    """Return the English name of a language, or None if it is unknown here.

    Args:
        code: Any spelling of its code, or its name: `de_DE`, `de`, `deu_Latn`, `German`.
    """
    iso = iso_code(code)
    return None if iso is None else NAMES[iso]


def iso_code(code: str) -> str | None:
    """Return a language's code as in `NAMES`, or None if it is unknown here: `de` for `de_DE`, `deu_Latn`, `German`."""
    plain = code.strip().strip("_<>")
    if plain.lower() in _BY_NAME:
        return _BY_NAME[plain.lower()]
    short = re.split(r"[_-]", plain)[0].lower()
    short = _THREE.get(short, short)
    return short if short in NAMES else None


def name_or_error(code: str, *, setting: str, given: bool, where: str) -> str:
    """Return the English name of a language, for models whose prompt names it.

    Raises:
        ConfigError, DataError: The language is unknown; arguments as for `check_code`.
    """
    name = language_name(code)
    if name is not None:
        return name
    said = f"`{code}` is no language that there is a name for"
    hint = f"a code like de, de_DE or deu_Latn, or an English name: {', '.join(sorted(set(NAMES.values())))}"
    if given:
        raise ConfigError(said, where=f"task.{setting}", hint=hint)
    raise DataError(said, where=f"`{setting}` of {where}", hint=hint)


def _pairs(text: str) -> dict[str, str]:
    return dict(entry.split("=") for entry in text.replace("\n", " ").split(", "))


NAMES = _pairs(
    "af=Afrikaans, am=Amharic, ar=Arabic, as=Assamese, ast=Asturian, az=Azerbaijani, ba=Bashkir, be=Belarusian, "
    "bg=Bulgarian, bn=Bengali, bo=Tibetan, br=Breton, bs=Bosnian, ca=Catalan, ceb=Cebuano, cs=Czech, cy=Welsh, "
    "da=Danish, de=German, dz=Dzongkha, el=Greek, en=English, eo=Esperanto, es=Spanish, et=Estonian, eu=Basque, "
    "fa=Persian, ff=Fulah, fi=Finnish, fo=Faroese, fr=French, fy=Western Frisian, ga=Irish, gan=Gan Chinese, "
    "gd=Scottish Gaelic, gl=Galician, gu=Gujarati, ha=Hausa, hak=Hakka Chinese, he=Hebrew, hi=Hindi, hr=Croatian, "
    "ht=Haitian Creole, hu=Hungarian, hy=Armenian, id=Indonesian, ig=Igbo, ilo=Iloko, is=Icelandic, it=Italian, "
    "ja=Japanese, jv=Javanese, ka=Georgian, kk=Kazakh, km=Khmer, kn=Kannada, ko=Korean, ku=Kurdish, ky=Kyrgyz, "
    "la=Latin, lb=Luxembourgish, lg=Ganda, ln=Lingala, lo=Lao, lt=Lithuanian, lv=Latvian, lzh=Classical Chinese, "
    "mg=Malagasy, mi=Maori, mk=Macedonian, ml=Malayalam, mn=Mongolian, mr=Marathi, ms=Malay, mt=Maltese, my=Burmese, "
    "nan=Min Nan Chinese, ne=Nepali, nl=Dutch, nn=Norwegian Nynorsk, no=Norwegian, ns=Northern Sotho, oc=Occitan, "
    "or=Odia, pa=Punjabi, pl=Polish, ps=Pashto, pt=Portuguese, rm=Romansh, ro=Romanian, ru=Russian, sa=Sanskrit, "
    "sd=Sindhi, shn=Shan, si=Sinhala, sk=Slovak, sl=Slovenian, sn=Shona, so=Somali, sq=Albanian, sr=Serbian, "
    "ss=Swati, su=Sundanese, sv=Swedish, sw=Swahili, ta=Tamil, te=Telugu, tg=Tajik, th=Thai, ti=Tigrinya, tk=Turkmen, "
    "tl=Tagalog, tn=Tswana, tr=Turkish, tt=Tatar, ug=Uyghur, uk=Ukrainian, ur=Urdu, uz=Uzbek, vi=Vietnamese, "
    "wo=Wolof, wuu=Wu Chinese, xh=Xhosa, yi=Yiddish, yo=Yoruba, yue=Cantonese, zh=Chinese, zu=Zulu"
)
"""English names by ISO 639-1 code, and by ISO 639-3 code where there is no shorter one."""
NAMES["nb"] = NAMES["no"]
_BY_NAME = {name.lower(): code for code, name in reversed(NAMES.items())}
_THREE = _pairs(
    "afr=af, amh=am, arb=ar, ara=ar, asm=as, azj=az, aze=az, bak=ba, bel=be, bod=bo, bur=my, chi=zh, dzo=dz, tib=bo, "
    "bul=bg, ben=bn, bos=bs, cat=ca, ces=cs, cym=cy, dan=da, deu=de, ger=de, ell=el, eng=en, epo=eo, spa=es, est=et, "
    "eus=eu, pes=fa, fas=fa, fin=fi, fao=fo, fra=fr, fre=fr, gle=ga, gla=gd, glg=gl, guj=gu, hau=ha, heb=he, hin=hi, "
    "hrv=hr, hat=ht, hun=hu, hye=hy, ind=id, ibo=ig, isl=is, ita=it, jpn=ja, jav=jv, kat=ka, kaz=kk, khm=km, kan=kn, "
    "kor=ko, kir=ky, ltz=lb, lug=lg, lin=ln, lao=lo, lit=lt, lvs=lv, lav=lv, mkd=mk, mal=ml, khk=mn, mon=mn, mar=mr, "
    "zsm=ms, msa=ms, mlt=mt, mya=my, npi=ne, nep=ne, nld=nl, dut=nl, nno=nn, nob=no, nor=no, nso=ns, oci=oc, ory=or, "
    "pan=pa, pol=pl, pbt=ps, pus=ps, por=pt, ron=ro, rus=ru, san=sa, snd=sd, sin=si, slk=sk, slv=sl, sna=sn, som=so, "
    "als=sq, sqi=sq, srp=sr, sun=su, swe=sv, swh=sw, swa=sw, tam=ta, tel=te, tgk=tg, tha=th, tir=ti, tuk=tk, tgl=tl, "
    "tsn=tn, tur=tr, tat=tt, uig=ug, ukr=uk, urd=ur, uzn=uz, uzb=uz, vie=vi, wol=wo, xho=xh, ydd=yi, yid=yi, yor=yo, "
    "zho=zh, cmn=zh, zul=zu"
)

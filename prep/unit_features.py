"""The feature vector of each unit: what its stream says, what its spikes say, what is known about it.

In: the session's unit table, the streams' features of the train split. Out: features (U, 28), settings.FEATURE_NAMES.
"""

import re

import numpy as np
import numpy.typing as npt

from prep.plan import Units
from prep.settings import FEATURE_NAMES, QUALITIES, REGIONS, SPIKE_FEATURES, STREAM_FEATURES, UNIT_KINDS

Features = npt.NDArray[np.float32]

FEATURE_LIMIT = 10.0
QUALITY_WORDS = {
    "good": ("good", "sua", "su", "single", "single unit", "single units", "isolated", "well isolated"),
    "mua": ("mua", "mu", "multi", "multi unit", "multiunit", "multi units"),
    "noise": ("noise", "unsorted", "artifact", "artefact", "bad", "junk"),
}

# A region's class is told by the first rule that fits: names of structures, then acronyms (the Allen Mouse Brain
# Atlas' and those in common use), then the word cortex. Acronyms count in texts of at most four words only.
NAMES = (
    ("elsewhere", r"hypothalam|subthalam|cerebell|piriform|olfactory|septum|septal|amygdal|pallid"),
    ("hippocampus", r"hippocamp|dentate|subicul|entorhinal"),
    ("thalamus", r"thalam|geniculate|habenul|\bpulvinar"),
    ("striatum", r"striat|caudo|caudate|putamen|accumbens"),
    ("midbrain", r"midbrain|collicul|mesenceph|tegment|nigra|periaqueduct|pretect|oculomotor|red nucleus|raphe"),
    ("visual", r"visual|inferotemporal"),
    ("somatosensory", r"somatosens|barrel|somatic sens"),
    ("motor", r"\b(pre|somato|sensori)?motor"),
)
LAYER = r"(l?\d[\dab]*)?"  # VISp5, MOs6a
ACRONYMS = (
    ("visual", rf"vis(?!c{LAYER}$)[a-z]{{0,3}}{LAYER}|v[1-6][abd]?|mt|mst"),
    ("motor", rf"mo[ps]?{LAYER}|[mcr]?m[12]|alm|pm[dv]|sma|rfa|cfa"),
    ("somatosensory", rf"ss[ps]?{LAYER}|ss[ps](bfd|ll|m|n|tr|ul|un){LAYER}|[wv]?s[12](bf)?"),
    (
        "cortex",
        rf"(aca[dv]?|pl|ila?|orb(l|m|vl)?|ai[dpv]?|rsp(d|v|agl)?|aud(p|d|v|po)?|tea|ect|peri|gu|visc|frp|ptlp){LAYER}"
        r"|[md]?pfc|[dv][lm]pfc|ofc|d?acc|rsc|ppc|a1|ctx|isocortex|neocortex|lip|fef",
    ),
    (
        "hippocampus",
        rf"[divr]?ca([123](so|sp|sr|slm|slu)?)?|dg(mo|po|sg)?|hpf|hpc|hip|sub[dv]?|pros|ent[lm]?{LAYER}|[ml]ec|fc|tr",
    ),
    (
        "thalamus",
        r"th|dorpm|dorsm|[dv]?lg[dv]?|[dv]?lgn[dv]?|lp|ld|md|mdth|vp[lm](pc)?|pom?|adn?|av|amd?|ant|atn|rtn?|trn|re"
        r"|mg[bdmv]?|val|va|vl|vm|cl|cm|pf|sgn|pvt|pt|rh|pcn|iad|imd|smt|eth|igl|pil|pp|pot|spa|spf[mp]?|[lm]h|intg",
    ),
    ("striatum", r"cpu?|acb|nac|str[dv]?|d[lm]s|fs|ot"),
    ("midbrain", r"sc[a-z]{0,2}|ic[cde]?|sn[cr]?|vta|mb|mrn|pag|rn|apn|not|npc|ppn|cun|dr|rr|prt|mpt|op|ppt"),
)
GENERIC = re.compile(r"cortex|cortical|frontal|parietal|temporal|cingul|retrosplen|auditory|insul|gustatory|perirhin")
MOST_WORDS = 4


def unit_features(units: Units, stream_features: Features) -> Features:
    """Features (U, 28) from the units' rows and the features (U, 7) of their streams: finite, 0 = unknown, to +-10."""
    features = np.zeros((len(units.unit_key), len(FEATURE_NAMES)), np.float32)
    features[:, : len(STREAM_FEATURES)] = stream_features
    if units.spike_features is not None:
        first = len(STREAM_FEATURES)
        features[:, first : first + len(SPIKE_FEATURES)] = units.spike_features
    if units.waveform_ms is not None:
        width_ms = np.where(units.waveform_ms > 0, units.waveform_ms, np.nan)
        features[:, FEATURE_NAMES.index("log_waveform_ms")] = np.log(width_ms)
    if units.depth_um is not None:
        features[:, FEATURE_NAMES.index("depth_mm")] = units.depth_um / 1000
        features[:, FEATURE_NAMES.index("has_depth")] = np.isfinite(units.depth_um)
    _set_one_hot(features, "is", UNIT_KINDS, list(units.kind))
    _set_one_hot(features, "quality", QUALITIES, [quality_class(word) for word in units.quality])
    _set_one_hot(features, "region", REGIONS, [region_class(text) for text in units.region])
    finite = np.where(np.isfinite(features), features, 0.0)
    return np.clip(finite, -FEATURE_LIMIT, FEATURE_LIMIT).astype(np.float32)


def _set_one_hot(features: Features, prefix: str, classes: tuple[str, ...], given: list[str]) -> None:
    for name in classes:
        features[:, FEATURE_NAMES.index(f"{prefix}_{name}")] = [one == name for one in given]


def quality_class(word: str) -> str:
    """One of settings.QUALITIES for a sorter's or curator's word; "" where it is none of those known."""
    plain = " ".join(re.findall(r"[a-z]+", word.lower()))
    return next((quality for quality, words in QUALITY_WORDS.items() if plain in words), "")


def region_class(text: str) -> str:
    """One of settings.REGIONS for the name or acronym of a brain region; "" where no region is named."""
    plain = text.lower()
    words = re.findall(r"[a-z0-9]+", plain)
    if not words:
        return ""
    for name, pattern in NAMES:
        if re.search(pattern, plain):
            return name
    if len(words) <= MOST_WORDS:
        for word in ("".join(words), *words):
            for name, pattern in ACRONYMS:
                if re.fullmatch(pattern, word):
                    return name
    return "cortex" if GENERIC.search(plain) else "elsewhere"

"""Sampling that a model's makers recommend: in generation_config.json of a folder, or in the header of a GGUF file.

Temperature and top_p are read, which is what this program samples by. A model that states nothing is sampled from its
own distribution (temperature 1), the default of OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from isthmus.models.errors import BundleError, InvalidInput
from isthmus.models.language.checkpoint.huggingface import read_json
from isthmus.models.messages import Sampling

UNSTATED = Sampling(temperature=1.0, top_p=1.0)
SMOLLM2_SAMPLING = Sampling(temperature=0.2, top_p=0.9)  # of its model card; its files state nothing
FILE = "generation_config.json"


def folder_sampling(folder: Path) -> Sampling:
    """Of a Hugging Face folder; `do_sample: false` is greedy. Raises BundleError."""
    stated = read_json(folder / FILE) if (folder / FILE).exists() else {}
    if stated.get("do_sample") is False:
        return Sampling(temperature=0.0)
    return sampling_of(stated, "temperature", "top_p", FILE)


def gguf_sampling(fields: Mapping[str, object]) -> Sampling:
    """Of a GGUF header. Raises BundleError."""
    return sampling_of(fields, "general.sampling.temp", "general.sampling.top_p", "GGUF")


def sampling_of(stated: Mapping[str, object], temperature: str, top_p: str, where: str) -> Sampling:
    """From the values under these two keys. Raises BundleError for what is no number, or out of range."""
    found = {"temperature": UNSTATED.temperature, "top_p": UNSTATED.top_p}
    for name, key in (("temperature", temperature), ("top_p", top_p)):
        value = stated.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
        elif value is not None:
            raise BundleError(f"{where}: {key} is {str(value)[:40]}, expected a number")
    try:
        return Sampling(found["temperature"], found["top_p"])
    except InvalidInput as error:
        raise BundleError(f"{where}: {error}") from error

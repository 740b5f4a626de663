"""A model with everything that belongs to it: weights, tokenizer, chat template, image processor, published names."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence

import jax
import numpy as np

from mmjax import active_adapters, tree, vocabulary
from mmjax.active_adapters import Choice
from mmjax.batch import Batch
from mmjax.data.collation import collate
from mmjax.data.encoding import Encoder, Example
from mmjax.data.images import ImageProcessor, size_of
from mmjax.data.messages import PLACEHOLDER, Message, Sample, validated
from mmjax.data.picture_tokens import PictureTokens
from mmjax.data.templates import Template
from mmjax.data.text_beside import TextBeside
from mmjax.errors import UserError
from mmjax.families.family import Config, Family
from mmjax.inference.generate import Ended
from mmjax.inference.generate import generate as generate_tokens
from mmjax.inference.sampling import Sampling, from_file
from mmjax.inference.stopping import before_stop, stopper
from mmjax.models import adapters as beside
from mmjax.models import calibration, new_rows, prompts, quantised
from mmjax.models.config import Execution, ModelConfig
from mmjax.models.quantised import Quantisation
from mmjax.tree import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Model:
    """family, foreign   the published family and its config.json
    run               how it is executed; run.dtype is that of activations
    connector_tokenizer   of the text that a Q-Former reads in its own vocabulary; connector_text: tokens of what the user says that
                      it reads beside a picture, 0 = none
    generation        the directory's generation_config.json: ids that begin and end a text
    bases             published weights under it: reference -> fingerprint
    own               paths of leaves that came from no published weights
    unmerged          the model that this one was before its adapters were merged
    """

    config: ModelConfig
    params: Params
    family: Family
    foreign: Config
    run: Execution = Execution()
    tokenizer: PreTrainedTokenizerBase | None = None
    template: Template | None = None
    image_processor: ImageProcessor | None = None
    image_start: str = ""
    image_end: str = ""
    connector_tokenizer: PreTrainedTokenizerBase | None = None
    connector_text: int = 0
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own: frozenset[str] = frozenset()
    unmerged: Model | None = None

    def __call__(
        self, inputs: Mapping[str, Any], output_hidden_states: bool = False, *, adapters: Choice | None = None
    ) -> dict[str, jax.Array]:
        """The outputs for inputs named as the Hugging Face processor or the reference names them; `adapters` as in `with_adapters`.

        Raises UserError for a name that the family does not take.
        """
        if adapters is not None:
            return self.with_adapters(adapters)(inputs, output_hidden_states)
        return self.family.outputs(
            self.params, self.config, self.foreign, self._known(inputs), self.run, output_hidden_states
        )

    def generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 16,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        return_scores: bool = False,
        adapters: Choice | None = None,
        **sampling: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """The new ids after each row's prompt, int32 [rows, new]: greedy unless `sampling` says otherwise (fields of
        mmjax.inference.sampling.Sampling). Rows that end earlier are filled up with the padding id.

        As in transformers, the directory's generation_config.json says which ids end an answer and pad it, and may ask for a
        repetition penalty, beams and the like; and without an `attention_mask` its padding ids among `input_ids` are padding.

        stop            strings that end an answer, which is kept up to the token that completes one
        return_scores   also the logits of each step, float32 [rows, new, vocab]
        adapters        as in `with_adapters`
        """
        if adapters is not None:
            model, more = self.with_adapters(adapters), {"ignore_eos": ignore_eos, "return_scores": return_scores, **sampling}
            return model.generate(inputs, max_new_tokens, stop=stop, **more)
        if self.family.prompt is None:
            raise UserError(f"a {self.family.model_types[0]} generates nothing")
        start = self.generation.get("decoder_start_token_id")
        foreign = self.foreign if start is None else {**self.foreign, "decoder_start_token_id": start}
        batch = self.family.prompt(self.config, foreign, self._masked(self._known(inputs)))
        batch = prompts.prepended(self.config, batch)
        if not ignore_eos and self.eos_ids:
            sampling = {"end": self.eos_ids, **sampling}
        settings = self.sampling(max_new_tokens, ignore_eos=ignore_eos, **sampling)
        ended = self.ended(stop)
        out = generate_tokens(self.params, self.config, batch, settings, self.run, return_scores, ended)
        used = max((_length(row, settings.end, ended) for row in out.tokens), default=0)
        return (out.tokens[:, :used], out.scores[:, :used]) if out.scores is not None else out.tokens[:, :used]

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        task: int = 0,
        adapters: Choice | None = None,
        **sampling: Any,
    ) -> str:
        """The answer to a conversation in Hugging Face messages; an image part has a `path` or the `image` itself. It ends before
        the first of the strings `stop`. `task`: of multi-task prompts, the one it is of; `adapters` as in `with_adapters`."""
        return self.answers([messages], max_new_tokens, stop=stop, task=task, adapters=adapters, **sampling)[0]

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        task: int = 0,
        adapters: Choice | None = None,
        **sampling: Any,
    ) -> list[str]:
        """The answers to several conversations, generated together; `adapters` as in `with_adapters`, also one choice for each."""
        if adapters is not None:
            return self.with_adapters(adapters).answers(conversations, max_new_tokens, stop=stop, task=task, **sampling)
        samples = [Sample(f"conversation {i}", validated(list(c)), task=task) for i, c in enumerate(conversations)]
        examples = [self.prompt(sample) for sample in samples]
        batch = self.collate([[example] for example in examples])
        settings = self.sampling(max_new_tokens, **sampling)
        ended = self.ended((*stop, *self.stops), settings)
        tokens = generate_tokens(self.params, self.config, batch, settings, self.run, ended=ended).tokens
        return [self.text(row, stop) for row in tokens]

    def prompt(self, sample: Sample) -> Example:
        """A sample's question, encoded, with the pixels of its images (paths are opened as files)."""
        example = self.encoder().encode(sample, generation_prompt=True, size_of=lambda part: size_of(_source(part)))
        if not example.images:
            return example
        if self.image_processor is None:
            raise UserError("this model has no image processor: its directory lacks preprocessor_config.json")
        pixels = [self.image_processor.tiles(_source(part)) for part in example.images]
        return dataclasses.replace(example, pixels=np.concatenate(pixels))

    def encoder(self, max_length: int = 0) -> Encoder:
        """From samples to ids, as this model's tokenizer and template have it. Raises UserError without them."""
        if self.tokenizer is None or self.template is None:
            missing = (
                "tokenizer" if self.tokenizer is None else "chat template (give one: mmjax.load(path, template=...))"
            )
            raise UserError(f"this model has no {missing}, so it takes ids, but no messages")
        tokens, llm = self.config.tokens_per_tile, self.config.language
        text = self.image_start, self.image_end, max_length
        start = llm.start_token if llm.encoder is not None else None
        return Encoder(
            self.tokenizer,
            self.template,
            tokens,
            *text,
            self._pictures(),
            mask=self.config.mask,
            media_positions=self._media_positions,
            placeholder=self._placeholder(),
            start_token=start,
            media_apart=self._media_apart(),
            beside=self.text_beside(self.connector_text) if self.connector_text else None,
            virtual=prompts.count(self.config),
            tasks=prompts.tasks(self.config),
        )

    def _placeholder(self) -> int | None:
        """The token that stands for a picture which is read between the blocks; None where media tokens stand there."""
        if self.config.cross_attention is None:
            return None
        assert self.tokenizer is not None
        if (id := self.tokenizer.get_vocab().get(PLACEHOLDER)) is None:
            raise UserError(
                f"a model that reads pictures between its blocks needs {PLACEHOLDER!r} among its tokenizer's tokens (model.new_tokens)"
            )
        if self.image_processor is not None and self.image_processor.tiling is not None:
            raise UserError("a model that reads pictures between its blocks takes each as one tile: its image processor cuts none")
        return id

    def _media_apart(self) -> bool:
        """Whether pictures stand beside the text. Raises UserError where they are cut into tiles."""
        if self.config.media_beside and self.image_processor is not None and self.image_processor.tiling is not None:
            raise UserError("a picture that stands beside the text is one tile: its image processor cuts none")
        return self.config.media_beside

    def text_beside(self, length: int) -> TextBeside:
        """How so many tokens of text are read beside a picture. Raises UserError where the connector has no tokenizer."""
        if self.connector_tokenizer is None:
            raise UserError("the connector reads text, but has no tokenizer: name one in model.connector.tokenizer")
        return TextBeside(self.connector_tokenizer, length)

    def _pictures(self) -> PictureTokens | None:
        """How a picture's tiles become tokens; None where it is one tile."""
        connector, processor = self.config.connector, self.image_processor
        if connector is None or processor is None or processor.tiling is None:
            return None
        return PictureTokens(connector.tokens, processor.shape[:2], processor.tiling, self.config.merge)

    def collate(self, rows: Sequence[Sequence[Example]], **settings: Any) -> Batch:
        """The batch of these rows under this model's mask; `settings` are those of mmjax.data.collation.collate.

        Raises UserError for pictures where a position has several axes: messages do not make those yet.
        """
        rope = self.config.llm.block.rope if self.config.llm else None
        if rope and rope.sections and any(example.images for row in rows for example in row):
            raise UserError(
                f"pictures in messages are not supported for a {self.family.model_types[0]}, whose positions have several axes; "
                "call the model with its processor's inputs"
            )
        longest = max((len(ids) for row in rows for example in row for ids in example.beside), default=0)
        beside = min(self.connector_text, -(-max(longest, 1) // 32) * 32)  # few lengths are compiled
        known = {"mask": self.config.mask, "media_positions": self._media_positions, "beside_length": beside}
        known |= {"virtual": prompts.count(self.config)}
        known |= {"stitched": self.config.features.stitching is not None}
        known |= {"row_media": 0, "media_apart": False} if self.config.cross_attention is not None else {}
        known |= {"row_media": 0, "media_apart": True} if self.config.media_beside else {}
        return collate(rows, **{**known, **settings})

    @property
    def _media_positions(self) -> bool:
        return self.config.llm is None or not self.config.llm.media_as_they_are

    def sampling(self, max_new_tokens: int, *, ignore_eos: bool = False, **settings: Any) -> Sampling:
        """Settings of generation with this model's ids for the end and for padding."""
        known = [field.name for field in dataclasses.fields(Sampling)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown setting of generation {name!r}; known are {', '.join(known)}")
        asked = self.generation or {**self.family.sections(self.foreign)["llm"], **self.foreign}
        ids = {"end": () if ignore_eos else self.end_ids, "pad": self.pad_id}
        try:
            return Sampling(**{**ids, **from_file(asked), **settings, "max_new_tokens": max_new_tokens})
        except ValueError as error:
            raise UserError(str(error)) from error

    def ended(self, stop: Sequence[str], sampling: Sampling | None = None) -> Ended | None:
        """What sees the end of an answer in the first of these strings; None without any, and for beams."""
        if not stop or (sampling is not None and sampling.num_beams > 1):
            return None
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it cannot stop at strings")
        return stopper(self.tokenizer, [stop] if isinstance(stop, str) else stop)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of generation_config.json, else of config.json."""
        for place in (self.generation, self.foreign, self.family.sections(self.foreign)["llm"]):
            if (value := place.get("eos_token_id")) is not None:
                return tuple(value) if isinstance(value, list) else (value,)
        return ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: those that end a text, the tokenizer's, and the template's stops that are one token."""
        found = list(self.eos_ids)
        if self.tokenizer is not None:
            if self.tokenizer.eos_token_id is not None:
                found.append(self.tokenizer.eos_token_id)
            for stop in self.template.stops if self.template else ():
                found += self._one_token(stop)
        return tuple(dict.fromkeys(found))

    @property
    def stops(self) -> tuple[str, ...]:
        """The template's stops that are several tokens."""
        stops = self.template.stops if self.template else ()
        return tuple(stop for stop in stops if stop.strip() and not self._one_token(stop))

    def _one_token(self, stop: str) -> list[int]:
        """The id of a string that is one token, else nothing."""
        assert self.tokenizer is not None
        ids = self.tokenizer(stop, add_special_tokens=False)["input_ids"]
        return ids if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else []

    @property
    def pad_id(self) -> int:
        """What follows an answer in its row."""
        return next((value for value in (self._padding, *self.eos_ids, *self.end_ids) if value is not None and value >= 0), 0)

    @property
    def _padding(self) -> int | None:
        """The padding id that the directory names."""
        places = (self.generation,) if self.generation else (self.foreign, self.family.sections(self.foreign)["llm"])
        return next((place["pad_token_id"] for place in places if place.get("pad_token_id") is not None), None)

    def _masked(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of generation with an attention_mask; see `generate`. An encoder is handed all ids, as in transformers."""
        if "attention_mask" in inputs or "input_ids" not in inputs or self.config.language.encoder is not None:
            return inputs
        if self._padding is None or self._padding in self.eos_ids:
            return inputs
        return {**inputs, "attention_mask": (inputs["input_ids"] != self._padding).astype(np.int32)}

    def text(self, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
        """Generated ids as text: up to the first end or stop, without special tokens, stripped."""
        assert self.tokenizer is not None
        end = next((i for i, id in enumerate(ids) if id in self.end_ids), len(ids))
        text = str(self.tokenizer.decode([int(id) for id in ids[:end]], skip_special_tokens=True))
        own = [stop for stop in (self.template.stops if self.template else ()) if stop.strip()]
        return before_stop(text, [*own, *([stop] if isinstance(stop, str) else stop)]).strip()

    def add_tokens(self, tokens: Sequence[str], start: new_rows.Start = "mean", seed: int = 0) -> Model:
        """The model with these tokens, each with vocabulary rows of its own: leaves `llm/embed/new_rows` and, beside an untied
        head, `llm/head/new_rows` (see mmjax.models.new_rows), which an export merges into the tables.

        start   what a new row begins as: the "mean" of the old ones, or "normal", drawn with their mean and deviation.
                Tokens that the model has already keep their id, and their row begins as it is.
        """
        if self.tokenizer is None or self.config.llm is None:
            missing = "tokenizer" if self.config.llm else "language model"
            raise UserError(f"tokens cannot be added: this model has no {missing}")
        tokenizer, lacked, had = vocabulary.with_tokens(self.tokenizer, tokens)
        if quantised.is_part(next((path for path in tree.flatten(self.params) if path.startswith("llm/head/kernel")), "")):
            raise UserError("tokens cannot be added: the head is quantised. Leave llm/head out of what is quantised")
        size = self.config.llm.vocab_size
        fresh = [*lacked, *(id for id in had if id >= size)]
        try:
            params, config = new_rows.add(
                self.params, self.config, fresh, [id for id in had if id < size], start, seed
            )
        except ValueError:
            raise UserError(
                f"the tokenizer had {len(self.tokenizer)} tokens before any was added, the language model only {size} "
                "embeddings: name those without one as well, or choose another tokenizer"
            ) from None
        own = self.own | set(new_rows.LEAVES) & set(tree.flatten(params))
        return dataclasses.replace(self, params=params, config=config, tokenizer=tokenizer, own=own)

    def resize_vocabulary(self, size: int) -> Model:
        """The model with `size` tokens: its tables grow by rows that are the mean of those they have, and rows that are leaves
        of their own are merged into them. The tokenizer stays as it is."""
        now = self.config.language.vocab_size
        if size < now:
            raise UserError(f"the vocabulary has {now} tokens; it cannot become smaller ({size})")
        params, config = new_rows.add(self.params, self.config, range(now, size))
        params, config = new_rows.merge(params, config)
        return dataclasses.replace(self, params=params, config=config)

    def with_adapters(self, adapters: Choice) -> Model:
        """The model with these of its adapters acting (see mmjax.active_adapters): a name, several, {name: weight}, or a list of such,
        one for each row of the calls to come; [] = none of them. A model acts with all of its adapters, each in full.

        A weight w goes from nothing (0) to the adapter (1) and beyond: LoRA and DoRA add w times their change; factors, biases and
        norms are that far on the way. Raises UserError for a name that the model does not have.
        """
        params, config = active_adapters.choose(self.params, self.config, adapters)
        return dataclasses.replace(self, params=params, config=config)

    def add_adapter(self, path: str | Path, name: str) -> Model:
        """The model with the adapter of one more peft directory, under a name of its own."""
        from mmjax.checkpoints import peft
        from mmjax.loading import with_adapter

        if name in (known := [adapter.name for adapter in self.config.adapters]):
            raise UserError(f"this model has an adapter {name!r} already, among {', '.join(known)}")
        return with_adapter(self, peft.read(path, name))

    def merge(self) -> Model:
        """The model with its acting adapters in its weights, for speed; prompts, prefixes and plugs stay beside them. It keeps what it
        was made of, so that `unmerge` gives that back bit by bit: the kernels that were changed are held twice."""
        params, config = beside.merge(self.params, self.config)
        return dataclasses.replace(self, params=params, config=config, unmerged=self)

    def unmerge(self) -> Model:
        """The model that `merge` made this one of."""
        if self.unmerged is None:
            raise UserError("this model was not merged here: load its base and its adapters instead")
        return self.unmerged

    def quantised(self, spec: Quantisation, texts: Sequence[str] = (), length: int = 512) -> Model:
        """The model with frozen kernels in few bits: rounded, or, in "int4", by AWQ (mmjax.models.calibration) on the ids of `texts`, one after
        another in rows of `length`. AWQ folds scales into norms and other kernels, so the model as a whole is another then.

        Raises UserError where some kernels are quantised already.
        """
        if self.config.quantisation is not None:
            raise UserError(f"this model is held in {self.config.quantisation.format} already")
        quantised.require(self.params, spec)
        if texts:
            tokens = self._calibration(texts, length)
            config = dataclasses.replace(self.config, quantisation=spec)
            return dataclasses.replace(self, params=calibration.quantised_by_awq(self.params, self.config, tokens, spec), config=config)
        return dataclasses.replace(
            self, params=quantised.converted(self.params, spec), config=dataclasses.replace(self.config, quantisation=spec)
        )

    def _calibration(self, texts: Sequence[str], length: int) -> np.ndarray:
        """int32 [rows, length] of the texts' ids, what does not fill a row left out."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it cannot be calibrated on texts")
        ids = [id for text in texts for id in self.tokenizer(text)["input_ids"]]
        if len(ids) < length:
            raise UserError(f"the texts have {len(ids)} tokens, and calibration needs at least one row of {length}")
        return np.asarray(ids[: len(ids) // length * length], np.int32).reshape(-1, length)

    def dequantised(self) -> Model:
        """The model with dense kernels, in its run's dtype: what its quantised ones stand for."""
        config = dataclasses.replace(self.config, quantisation=None)
        return dataclasses.replace(self, params=quantised.dequantised(self.params, self.run.dtype), config=config)

    def save_pretrained(
        self, path: str | Path, *, layout: str = "", dtype: str = "", merge_adapters: bool = True
    ) -> None:
        """A directory that transformers loads, or that the reference's own code does.

        layout   "hf" (transformers), "original" (LLaVA's authors'), "mmjax" (ours); "" = the one it was read in, or
                 the first that can hold it
        dtype    of the written weights; "" = as they are held. Adapters are merged into the weights they change.
        """
        from mmjax.export import save

        save(self, Path(path), layout=layout, dtype=dtype, merge_adapters=merge_adapters)

    def _known(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        taken = (*self.family.inputs, "task_ids") if prompts.tasks(self.config) else self.family.inputs
        for name in inputs:
            if name not in taken:
                near = difflib.get_close_matches(name, taken, 1)
                nearest = f" (nearest: {near[0]!r})" if near else ""
                raise UserError(f"unknown input {name!r}{nearest}; a {self.family.model_types[0]} takes {', '.join(taken)}")
        return {name: _array(value) for name, value in inputs.items() if value is not None}


def _source(part: Mapping[str, Any]) -> Any:
    """The picture of an image part, or its file's path."""
    return part.get("image", part.get("path"))


def _array(value: Any) -> np.ndarray:
    """A list of arrays of different shapes becomes an array of them."""
    if isinstance(value, (list, tuple)) and len({np.shape(part) for part in value}) > 1:
        parts = np.empty(len(value), object)
        parts[:] = [np.asarray(part) for part in value]
        return parts
    return np.asarray(value)


def _length(row: np.ndarray, end: tuple[int, ...], ended: Ended | None) -> int:
    """How many of a row's new ids are its answer."""
    stopped = ended(row) if ended else None
    ends = np.flatnonzero(np.isin(row, end))
    return min(len(row) if stopped is None else stopped, int(ends[0]) + 1 if len(ends) else len(row))

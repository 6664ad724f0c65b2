"""Ways to call the wrapped weights, one tiny method per stage, and what is in force of it in each of them.

Each way gives the log-probabilities of one fixed answer, token by token. Where they are those that `generate` gives
under the method, it is in force; where the call ends in a `ValueError` or `TypeError`, it was refused; where one
warning names the method, it was said. Anything else is a fault: `vlmfix` was silent, or half in force.
"""

import copy
import io
import pickle
import threading
import traceback
import warnings
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import vlmfix
from tests.models import llava, picture_prompt
from vlmfix.engine.wrap import wrapped
from vlmfix.method.intervention import Intervention, Traits
from vlmfix.method.stages import ASK_STAGES, TABLE

ANSWER = [5, 9, 14, 7]
"""The answer whose log-probabilities are compared."""


# ---- one method per stage -------------------------------------------------------------------------------------------


class _Acts(Intervention):
    """A method that says that it acted."""

    def effects(self, memo):
        return [{"acted": True}]


@dataclass(frozen=True)
class Refine(_Acts):
    name: ClassVar[str] = "refining"

    def refine(self, look, images, prompt):
        return images, prompt + " Really?", {"acted": True}


@dataclass(frozen=True)
class Begin(_Acts):
    """Reads the prompt beforehand, and edits by what it has read."""

    name: ClassVar[str] = "beginning"

    @property
    def traits(self):
        return Traits(whole_prompt=True, captures=("heads",))

    def begin(self, prompt, memo):
        memo["read"] = prompt.capture("heads", [0])[0].norm(dim=-1).tanh()

    def heads(self, o, site):
        return o * (1 + site.memo["read"][:, None, :, None]) if site.layer == 1 else o

    def at_layers(self, n_layers):
        return range(n_layers)


@dataclass(frozen=True)
class LayerInput(_Acts):
    name: ClassVar[str] = "looking"

    @property
    def traits(self):
        return Traits(whole_prompt=True)

    def layer_input(self, x, site):
        if site.layer == 0:
            site.memo["read"] = x[:, site.rows[0]].norm(dim=-1).mean(1).tanh()

    def heads(self, o, site):
        return o * (1 + site.memo["read"][:, None, None, None])


@dataclass(frozen=True)
class Tokens(_Acts):
    name: ClassVar[str] = "entering"

    def tokens(self, inputs, site, look):
        return {**inputs, "hidden_states": inputs["hidden_states"] * 1.3} if site.layer == 1 else inputs


@dataclass(frozen=True)
class Survey(_Acts):
    name: ClassVar[str] = "surveying"

    @property
    def traits(self):
        return Traits(whole_prompt=True)

    def survey(self, a, site):
        last = site.prompt.n - 1  # of the prompt, not of the piece of rows at hand
        if site.layer == 0 and last in site.positions.tolist():
            site.memo["read"] = a[:, :, site.positions.tolist().index(last)].amax(dim=-1)

    def heads(self, o, site):
        return o * (1 + site.memo["read"][:, None, :, None]) if site.layer == 1 else o


@dataclass(frozen=True)
class Scores(_Acts):
    name: ClassVar[str] = "scoring"

    def scores(self, s, site):
        return s + 2.0 * site.geometry.image[:, None, None]


@dataclass(frozen=True)
class Weights(_Acts):
    name: ClassVar[str] = "weighing"

    def weights(self, a, site):
        return a * (1 + site.geometry.image[:, None, None])


@dataclass(frozen=True)
class Heads(_Acts):
    name: ClassVar[str] = "amplifying"

    def heads(self, o, site):
        return o * 1.5


@dataclass(frozen=True)
class Cache(_Acts):
    """Edits the keys of what was generated, once."""

    name: ClassVar[str] = "storing"

    def cache(self, keys, values, site):
        if site.n_prompt:
            return keys, values
        return keys, torch.cat([values[:, :, :-1], values[:, :, -1:] * 3], dim=2)


@dataclass(frozen=True)
class Mlp(_Acts):
    name: ClassVar[str] = "adding"

    def mlp(self, x, site):
        return x * 1.5


@dataclass(frozen=True)
class Logits(_Acts):
    name: ClassVar[str] = "choosing"

    def logits(self, scores, step):
        return scores + torch.arange(scores.shape[-1]) % 2


@dataclass(frozen=True)
class Decode(_Acts):
    name: ClassVar[str] = "deciding"

    def decode(self, run):
        return run.generate(num_beams=2), [{"acted": True}] * len(run.questions)


METHODS = {
    "refine": Refine(), "begin": Begin(), "layer_input": LayerInput(), "tokens": Tokens(), "survey": Survey(),
    "scores": Scores(), "weights": Weights(), "heads": Heads(), "cache": Cache(), "mlp": Mlp(), "logits": Logits(),
    "decode": Decode(),
}  # fmt: skip
"""Stage -> a method that acts there, or edits by what it sees there."""
assert list(METHODS) == [stage.name for stage in TABLE]


# ---- what is measured -----------------------------------------------------------------------------------------------


class Forced:
    """A logits processor that writes the fixed answer, and notes how likely each of its tokens was."""

    listens = True
    """It comes last."""

    def __init__(self, start):
        self.start, self.noted, self.n_rows = start, {}, 0

    def __call__(self, input_ids, scores):
        self.n_rows = len(scores)
        step = input_ids.shape[1] - self.start
        token = ANSWER[min(step, len(ANSWER) - 1)]
        self.noted[step] = scores.float().log_softmax(-1)[0, token]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0.0
        return forced

    def trace(self):
        return torch.stack([self.noted[step] for step in range(len(ANSWER))])


def generated(model, prompt=None, by="generate", **settings):
    """By a call of `generate`."""
    prompt = picture_prompt(model) if prompt is None else prompt
    start = prompt["input_ids"].shape[1] if "input_ids" in prompt else 0
    forced = Forced(start)
    settings = {"max_new_tokens": len(ANSWER), "do_sample": False, **settings}
    getattr(model, by)(**prompt, logits_processor=LogitsProcessorList([forced]), **settings)
    return forced.trace()


def likelihood(logits, tokens=ANSWER):
    """(N,) of logits (1, N, V)."""
    return logits.float().log_softmax(-1)[0].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def whole(model):
    """Prompt and answer in one input, and the length of the prompt."""
    prompt = picture_prompt(model)
    tokens = torch.tensor([ANSWER])
    n = prompt["input_ids"].shape[1]
    ids = torch.cat([prompt["input_ids"], tokens], dim=1)
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, n


def scored(model, door=None, **told):
    """By one forward pass over prompt and answer."""
    inputs, n = whole(model)
    if told.pop("labels", False):
        told["labels"] = inputs["input_ids"].clone()
        told["labels"][:, :n] = -100
    if told.pop("prompt_end", False):
        told["prompt_end"] = n
    output = (door or model)(**inputs, **told)
    return likelihood(output.logits[:, n - 1 : -1])


def stepped(model, door=None, head=None, copied=lambda cache: cache, positional=False):
    """By a loop written by hand, with a cache."""
    door = door or model
    inputs, rows = {**picture_prompt(model), "use_cache": True}, []
    for token in ANSWER:
        ids = (inputs.pop("input_ids"),) if positional else ()
        output = door(*ids, **inputs)
        rows.append(head(output.last_hidden_state) if head else output.logits)
        cache = copied(output.past_key_values)
        inputs = {"input_ids": torch.tensor([[token]]), "past_key_values": cache, "use_cache": True}
    return likelihood(torch.cat([row[:, -1:] for row in rows], dim=1))


def repeated(model, **told):
    """By a loop written by hand, without a cache: everything again for each token."""
    inputs, n = whole(model)
    if told.pop("prompt_end", False):
        told["prompt_end"] = n
    rows = []
    for step in range(len(ANSWER)):
        end = n + step
        cut = {**inputs, "input_ids": inputs["input_ids"][:, :end], "attention_mask": None}
        rows.append(model(**cut, use_cache=False, **told).logits[:, -1:])
    return likelihood(torch.cat(rows, dim=1))


def pieces(model):
    """The prompt by hand in two pieces, then the answer."""
    prompt = picture_prompt(model)
    ids, cut = prompt.pop("input_ids"), 22
    cache = DynamicCache(config=model.config.get_text_config())
    first = model(input_ids=ids[:, :cut], pixel_values=prompt["pixel_values"], past_key_values=cache, use_cache=True)
    output, rows = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values, use_cache=True), []
    for token in ANSWER:
        rows.append(output.logits[:, -1:])
        output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return likelihood(torch.cat(rows, dim=1))


# ---- ways -----------------------------------------------------------------------------------------------------------


class _Quiet(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """What somebody gives as `custom_generate`: a loop of their own."""
    return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)


def own_loop_without_processors(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Another one, which leaves out what generate has prepared."""
    cache, rows = kwargs["past_key_values"], []
    encoded = {name: kwargs[name] for name in ("pixel_values", "mm_encoder_outputs") if name in kwargs}
    output = model(input_ids=input_ids, past_key_values=cache, **encoded)
    for token in ANSWER:
        rows.append(output.logits[:, -1:])
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    OWN.append(likelihood(torch.cat(rows, dim=1)))
    return input_ids


OWN = []


def without_processors(model):
    OWN.clear()
    model.generate(**picture_prompt(model), custom_generate=own_loop_without_processors, max_new_tokens=4)
    return OWN[0]


def batched(model):
    model.generate_batch([picture_prompt(model)["input_ids"][0].tolist()], max_new_tokens=4)


def batched_by_hand(model):
    model.init_continuous_batching(GenerationConfig(max_new_tokens=4))


def embedded(model):
    """Embeddings and ids of the same prompt."""
    prompt = picture_prompt(model)
    ids = prompt["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    features = model.get_image_features(pixel_values=prompt["pixel_values"]).pooler_output
    embeds = embeds.masked_scatter((ids == 60)[..., None], torch.cat(list(features)))
    inputs = {"inputs_embeds": embeds, "attention_mask": prompt["attention_mask"]}
    return inputs, ids == 60


def from_embeddings(model, told):
    inputs, image = embedded(model)
    return generated(model, inputs, **({"image_mask": image} if told else {}))


def further_turn(model, told):
    """On the cache that the pass over the prompt has filled."""
    prompt = picture_prompt(model)
    n = prompt["input_ids"].shape[1]
    cut = {name: x if name == "pixel_values" else x[:, :-1] for name, x in prompt.items()}
    cache = model(**cut, **({"prompt_end": n} if told else {})).past_key_values
    prompt.pop("pixel_values")
    return generated(model, prompt, past_key_values=cache)


def adapters(name):
    """PEFT's, that add nothing yet."""
    import peft

    configs = {
        "LoRA": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
        "LoRA on all projections": lambda: peft.LoraConfig(target_modules="all-linear", r=2),
        "LoRA and MLPs": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["mlp"]),
        "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }

    def around(model):
        return peft.get_peft_model(model, configs[name]()).eval()

    return around


def added(model):
    """An adapter of transformers' own integration."""
    import peft

    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    return model.eval()


def disabled(model, on):
    """An adapter that changes the answer is switched off for a while."""
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = on(peft.get_peft_model(model, config).eval())
    with adapted.disable_adapter():
        return generated(adapted)


def replicated(model):
    """As nn.DataParallel does it for each of several devices."""
    replica = model._replicate_for_data_parallel()
    return scored(model, replica, labels=True)


def in_threads(model):
    """In two threads at once, other than the one that wrapped."""
    results, errors = [], []

    def work():
        try:
            with torch.no_grad():
                results.append(generated(model))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    torch.testing.assert_close(results[0], results[1])
    return results[0]


def stored(model):
    """Through torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def distributed(model):
    """One process of torch.distributed."""
    import tempfile

    import torch.distributed as dist

    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
        try:
            return scored(model, nn.parallel.DistributedDataParallel(model), labels=True)
        finally:
            dist.destroy_process_group()


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with torch.enable_grad():
        return scored(model, labels=True).detach()


def checkpointed_by_torch(model, on, reentrant):
    """Layers that torch wraps, so that transformers knows nothing of it; there and back."""
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    layers, wrapper = set(model.get_decoder().layers), partial(checkpoint_wrapper, checkpoint_impl=impl)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda module: module in layers)
    on(model)
    with torch.enable_grad():
        trace = scored(model, labels=True)
        trace.sum().backward()
    return trace.detach()


def hooked(model):
    """With a hook of accelerate around the model that came later."""
    add_hook_to_module(model, ModelHook(), append=True)
    return model


def with_gradients(model):
    with torch.enable_grad():
        return scored(model, labels=True).detach()


def merged(model, on):
    return on(adapters("LoRA")(model)).merge_and_unload()


def unloaded(model, on):
    return on(adapters("LoRA")(model)).unload()


def headless(model):
    return scored_headless(model)


def scored_headless(model):
    inputs, n = whole(model)
    return likelihood(model.lm_head(model.base_model(**inputs, prompt_end=n).last_hidden_state)[:, n - 1 : -1])


def inner_alone(model):
    """The text decoder by itself, on embeddings."""
    inputs, _ = embedded(model)
    embeds = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(torch.tensor([ANSWER]))], dim=1)
    n = inputs["inputs_embeds"].shape[1]
    hidden = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    return likelihood(model.lm_head(hidden)[:, n - 1 : -1])


def layers_alone(model):
    """Decoder layers called one by one."""
    inputs, _ = embedded(model)
    decoder = model.get_decoder()
    x = torch.cat([inputs["inputs_embeds"], model.get_input_embeddings()(torch.tensor([ANSWER]))], dim=1)
    n, positions = inputs["inputs_embeds"].shape[1], torch.arange(x.shape[1])[None]
    rotary = decoder.rotary_emb(x, positions)
    mask = torch.full((x.shape[1],) * 2, -1e9).triu(1)[None, None]
    for layer in decoder.layers:
        output = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        x = output[0] if isinstance(output, tuple) else output
    return likelihood(model.lm_head(decoder.norm(x))[:, n - 1 : -1])


def spared(model):
    """Compiling the vision tower would only take time."""
    tower = model.model.vision_tower
    tower.forward = torch.compiler.disable(tower.forward)
    return model


def compiled(model):
    spared(model)
    return torch.compile(model, backend="eager")


def assistant():
    return llava(n_layers=1, seed=3)


WAYS = {
    "`vlmfix.ask`": None,
    "generate": lambda m, on: generated(on(m)),
    "generate, sampling": lambda m, on: generated(on(m), do_sample=True),
    "generate, several samples": lambda m, on: generated(on(m), do_sample=True, num_return_sequences=2),
    "generate, beams": lambda m, on: generated(on(m), num_beams=2),
    "generate, sampled beams": lambda m, on: generated(on(m), num_beams=2, do_sample=True),
    "generate, prompt lookup": lambda m, on: generated(on(m), prompt_lookup_num_tokens=2),
    "generate, an assistant model": lambda m, on: generated(on(m), assistant_model=assistant()),
    "generate, early exit": lambda m, on: generated(on(m), assistant_early_exit=1),
    "generate, contrastive search": lambda m, on: generated(
        on(m), penalty_alpha=0.6, top_k=4, trust_remote_code=True),
    "generate, DoLa": lambda m, on: generated(on(m), dola_layers="low", trust_remote_code=True),
    "generate, groups of beams": lambda m, on: generated(
        on(m), num_beams=2, num_beam_groups=2, diversity_penalty=0.5, trust_remote_code=True),
    "generate, constraints": lambda m, on: generated(
        on(m), num_beams=2, force_words_ids=[[5]], trust_remote_code=True),
    "generate, `custom_generate` from the hub": lambda m, on: generated(
        on(m), custom_generate="transformers-community/dola", trust_remote_code=True),
    "generate, `custom_generate`, a function": lambda m, on: generated(on(m), custom_generate=own_loop),
    "generate, `custom_generate` without processors": lambda m, on: without_processors(on(m)),
    "generate, streamer": lambda m, on: generated(on(m), streamer=_Quiet()),
    "generate, no cache": lambda m, on: generated(on(m), use_cache=False),
    "generate, static cache": lambda m, on: generated(on(m), cache_implementation="static"),
    "generate, prompt in chunks": lambda m, on: generated(on(m), prefill_chunk_size=22),
    "generate, `compile_config`": lambda m, on: generated(
        on(spared(m)), cache_implementation="static", compile_config=compile_config(), disable_compile=False),
    "generate, embeddings and `image_mask`": lambda m, on: from_embeddings(on(m), True),
    "generate, embeddings": lambda m, on: from_embeddings(on(m), False),
    "generate on the cache of a pass with `prompt_end=`": lambda m, on: further_turn(on(m), hasattr(m, "_vlmfix")),
    "generate, paged": lambda m, on: generated(on(m), cache_implementation="paged"),
    "generate_batch": lambda m, on: batched(on(m)),
    "init_continuous_batching": lambda m, on: batched_by_hand(on(m)),
    "forward, `labels=`": lambda m, on: scored(on(m), labels=True),
    "forward, `prompt_end=`": lambda m, on: scored(on(m), prompt_end=True),
    "forward with gradients, `labels=`": lambda m, on: with_gradients(on(m)),
    "`model.forward(...)`, `labels=`": lambda m, on: scored(on(m), m.forward, labels=True),
    "loop by hand": lambda m, on: stepped(on(m)),
    "loop by hand, ids by position": lambda m, on: stepped(on(m), positional=True),
    "loop by hand, copied caches": lambda m, on: stepped(on(m), copied=copy.deepcopy),
    "loop by hand, prompt in two pieces": lambda m, on: pieces(on(m)),
    "loop by hand, no cache, `prompt_end=`": lambda m, on: repeated(on(m), prompt_end=True),
    "loop by hand, no cache": lambda m, on: repeated(on(m)),
    "the model without its head, loop": lambda m, on: stepped(on(m), m.base_model, m.lm_head),
    "the model without its head, `prompt_end=`": lambda m, on: scored_headless(on(m)),
    "the text decoder alone": lambda m, on: inner_alone(on(m)),
    "decoder layers alone": lambda m, on: layers_alone(on(m)),
    "gradient checkpointing": lambda m, on: checkpointed(on(m), False),
    "gradient checkpointing, reentrant": lambda m, on: checkpointed(on(m), True),
    "checkpointing by torch's own wrapper": lambda m, on: checkpointed_by_torch(m, on, True),
    "LoRA, then wrap": lambda m, on: generated(on(adapters("LoRA")(m))),
    "LoRA, then wrap the model inside": lambda m, on: (adapters("LoRA")(m), generated(on(m)))[1],
    "wrap, then LoRA": lambda m, on: generated(adapters("LoRA")(on(m))),
    "wrap, then LoRA on all projections": lambda m, on: generated(adapters("LoRA on all projections")(on(m))),
    "LoRA on all projections, then wrap": lambda m, on: generated(on(adapters("LoRA on all projections")(m))),
    "LoRA, forward, `labels=`": lambda m, on: scored(on(adapters("LoRA")(m)), labels=True),
    "LoRA, loop by hand": lambda m, on: stepped(on(adapters("LoRA")(m))),
    "LoRA merged after wrap": lambda m, on: generated(merged(m, on)),
    "LoRA on all projections merged after wrap": lambda m, on: generated(
        on(adapters("LoRA on all projections")(m)).merge_and_unload()),
    "`model.add_adapter`, then wrap": lambda m, on: generated(on(added(m))),
    "wrap, then LoRA with a copy of the MLPs": lambda m, on: generated(adapters("LoRA and MLPs")(on(m))),
    "LoRA with a copy of the MLPs, then wrap": lambda m, on: generated(on(adapters("LoRA and MLPs")(m))),
    "LoRA unloaded after wrap": lambda m, on: generated(unloaded(m, on)),
    "LoRA disabled for a while": disabled,
    "IA3, then wrap": lambda m, on: generated(on(adapters("IA3")(m))),
    "wrap, then IA3": lambda m, on: generated(adapters("IA3")(on(m))),
    "AdaLoRA, then wrap": lambda m, on: generated(on(adapters("AdaLoRA")(m))),
    "OFT, then wrap": lambda m, on: generated(on(adapters("OFT")(m))),
    "prompt tuning, generate": lambda m, on: generated(on(adapters("prompt tuning")(m))),
    "prompt tuning, forward": lambda m, on: scored(on(adapters("prompt tuning")(m)), labels=True),
    "wrap, then prompt tuning": lambda m, on: generated(adapters("prompt tuning")(on(m))),
    "prefix tuning, generate": lambda m, on: generated(on(adapters("prefix tuning")(m))),
    "prefix tuning, forward": lambda m, on: scored(on(adapters("prefix tuning")(m)), labels=True),
    "compiled, then wrap": lambda m, on: scored(on(compiled(m)), labels=True),
    "wrap, then compiled": lambda m, on: scored(compiled(on(m)), labels=True),
    "compiled, generate": lambda m, on: generated(on(compiled(m))),
    "copy.deepcopy": lambda m, on: generated(copy.deepcopy(on(m))),
    "pickle": lambda m, on: generated(pickle.loads(pickle.dumps(on(m)))),
    "torch.save and load": lambda m, on: generated(stored(on(m))),
    "two threads": lambda m, on: in_threads(on(m)),
    "nn.DataParallel": lambda m, on: scored(m, nn.DataParallel(on(m)), labels=True),
    "nn.DataParallel over several devices": lambda m, on: replicated(on(m)),
    "DistributedDataParallel": lambda m, on: distributed(on(m)),
    "wrap, then hooks of accelerate": lambda m, on: generated(hooked(on(m))),
    "hooks of accelerate, then wrap": lambda m, on: generated(on(hooked(m))),
}  # fmt: skip


def compile_config():
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


# ---- verdicts -------------------------------------------------------------------------------------------------------

IN_FORCE, REFUSED, SAID, NOT_POSSIBLE = "in force", "refused", "said once", "-"
SILENT, HALF, AGAIN = "NOT IN FORCE, SILENTLY", "SOMETHING ELSE, SILENTLY", "SAID SEVERAL TIMES"
"""The last three are faults."""
ASK = "`vlmfix.ask`"
"""The one way that needs a processor, and is measured on the embedded model."""
FAULTS = (SILENT, HALF, AGAIN)
SLOW = ("generate, `compile_config`", "compiled, then wrap", "wrap, then compiled")
"""Ways that take seconds for each stage."""


def tiny():
    return llava(n_layers=2)


@cache
def plain(way="generate"):
    """The untouched model in some way; `None` where transformers itself cannot do it with this model or here."""
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return WAYS[way](tiny(), lambda handle: handle)
        except Exception:
            return None


@cache
def reference(stage):
    """By `generate`, under the method of a stage."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generated(vlmfix.wrap(tiny(), METHODS[stage]))


def from_vlmfix(error):
    """Whether vlmfix itself raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return "/vlmfix/" in frames[-1].filename


@cache
def embedded_model():
    return vlmfix.load("organism")


def asked(stage):
    """`vlmfix.ask`, beside `generate` with the inputs that it should have made."""
    from PIL import Image

    model, processor = embedded_model()
    picture, prompt, method = Image.new("RGB", (64, 64), "navy"), "What is this?", METHODS[stage]
    asker = vlmfix.Asker(model, processor, method)
    question = (picture, prompt + " Really?" if stage == "refine" else prompt)
    inputs = asker.inputs([question])
    forced = Forced(inputs["input_ids"].shape[1])
    record = asker.ask(picture, prompt, max_new_tokens=len(ANSWER), logits_processor=[forced])
    with wrapped(model, None if stage in ASK_STAGES else method):
        want = generated(model, inputs)
    same = torch.allclose(forced.trace(), want, atol=2e-4) and forced.n_rows == (2 if stage == "decode" else 1)
    return (IN_FORCE, "") if same and record.effects[0]["acted"] else (HALF, "")


def verdict(way, stage):
    """What becomes of a stage's method in a way to call, and in which words: "METHOD" stands for its name."""
    if way == ASK:
        return asked(stage)
    outcome, sentence = _verdict(way, stage)
    return outcome, sentence.replace(METHODS[stage].name, "METHOD")


def _verdict(way, stage):
    method, model = METHODS[stage], tiny()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        try:
            trace = WAYS[way](model, lambda handle: vlmfix.wrap(handle, method))
        except Exception as error:
            if isinstance(error, (ValueError, TypeError)) and from_vlmfix(error):
                return REFUSED, str(error)
            if plain(way) is not None:
                raise
            trace = None
    sentences = [str(each.message) for each in heard if method.name in str(each.message)]
    if sentences:
        return (SAID if len(set(sentences)) == len(sentences) else AGAIN), sentences[0]
    if trace is None:
        return NOT_POSSIBLE, ""
    asks = stage in ASK_STAGES
    if not asks and torch.allclose(trace, reference(stage), atol=2e-4):
        return IN_FORCE, ""
    unchanged = plain(way) is not None and torch.allclose(trace, plain(way), atol=1e-3)
    return (SILENT if unchanged else HALF), f"{(trace - reference(stage)).abs().max():.4f}"

"""Tokens per second of adapter tuning: our tuning program beside peft in PyTorch, eager and compiled.

  python benchmarks/bench_language.py [--model=tinystories-656k|smollm2-135m] [--batch=16] [--tokens=128] [--json=FILE]

A step is forward, backward to the adapters (rank 8, all dense layers) and Adam. Same weights (random, of the published
size), adapters, rows and rates. Of SmolLM2 the last four of thirty blocks have adapters, and both sides begin with the
states before them. PyTorch computes logits of response tokens alone; ours, whose rows differ in a cluster, of all. The
losses of the first steps must agree before anything is timed; rounds are interleaved, medians are compared. Needs
PyTorch, transformers and peft. --quick: short rounds, and no torch.compile.
"""

import argparse
import dataclasses
import os
import warnings

import jax
import numpy as np
import peft
import torch
import transformers
from reporting import deliver, interleaved, new_parser, rates_and_ratios
from workloads import SEED_WORDS, Program

from lmeraser_jax.config import Tuning
from lmeraser_jax.data.text_rows import TextSpec, pack
from lmeraser_jax.models import backbone as backbone_lib
from lmeraser_jax.models import peft_files
from lmeraser_jax.models.architectures import DecoderConfig
from lmeraser_jax.storage.checkpoints import flatten
from lmeraser_jax.training import train_step
from lmeraser_jax.training.features import compute_dtype
from lmeraser_jax.training.fingerprint import pinned
from lmeraser_jax.training.tasks import TextRows, TuningSpec

SMALL = DecoderConfig(
    vocabulary=2048, context=512, width=128, depth=2, heads=8, kv_heads=4, head_size=16, mlp=384,
    theta=1e4, epsilon=1e-6, tied=True,
)  # fmt: skip
LARGE = DecoderConfig(  # one frozen block in place of 26: their states are given
    vocabulary=49152, context=8192, width=576, depth=5, heads=9, kv_heads=3, head_size=64, mlp=1536,
    theta=1e5, epsilon=1e-5, tied=True,
)  # fmt: skip
MODELS = {"tinystories-656k": (SMALL, 0), "smollm2-135m": (LARGE, 4)}  # architecture, blocks with adapters; 0: all
CHECKED = 5  # steps whose losses must agree
TOLERANCE = {"cpu": 1e-3, "gpu": 5e-2}  # of a loss, relative; bfloat16 on GPU


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Rows of one length, their states before the first block with adapters, and the frozen weights."""

    spec: TuningSpec
    params: backbone_lib.Params
    rows: np.ndarray  # int32 [steps * B, 2 + T]
    states: np.ndarray | None  # float32 [steps * B, T, D]
    query: int  # tokens of each query
    steps: int


def problem_of(arguments: argparse.Namespace) -> Problem:
    architecture, layers = MODELS[arguments.model]
    tuning = Tuning(method="lora", lora_layers=layers, batch=arguments.batch, lanes=1, scan_steps=arguments.steps)
    tuning = dataclasses.replace(tuning, prompt_width=0)
    spec = TuningSpec(architecture, TextSpec(arguments.tokens), tuning, 0, seed=0, state_batch=arguments.batch)
    rng, count = np.random.default_rng(0), arguments.steps * arguments.batch
    params = jax.tree.map(lambda leaf: _random(rng, leaf.shape), backbone_lib.graph(architecture)[1])
    query = arguments.tokens // 3
    tokens = rng.integers(0, architecture.vocabulary, (count, arguments.tokens))
    rows = np.stack([pack(row[:query].tolist(), row[query:].tolist(), arguments.tokens) for row in tokens])
    shape = (count, arguments.tokens, architecture.width)
    states = rng.standard_normal(shape).astype(np.float32) if layers else None
    return Problem(spec, params, rows, states, query, arguments.steps)


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Weights whose layers keep the size of their inputs; ones for norms."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape) * min(shape) ** -0.5 * 0.5).astype(np.float32)


def program_of(problem: Problem) -> Program:
    """The tuning program on one device with one lane."""
    states, labels = problem.states, np.full(len(problem.rows), -1, np.int32)
    if states is not None:
        mesh = train_step.mesh_of(jax.devices()[:1])
        states = states.astype(compute_dtype(problem.spec.tuning.dtype, mesh))
    return Program(problem.spec, problem.params, TextRows(problem.rows, states), labels, problem.steps)


class Theirs:
    """The same with peft's adapters in transformers' model, on a GPU in bfloat16 with float32 adapters."""

    def __init__(self, problem: Problem, compiled: bool):
        self.problem, spec, on_gpu = problem, problem.spec, torch.cuda.is_available()
        self.device, self.dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
        self.model = _llama(spec.architecture, problem.params).to(self.device, self.dtype)
        key = jax.random.key(spec.seed)
        for word in SEED_WORDS:
            key = jax.random.fold_in(key, word)
        adapters = train_step.fresh_slice(spec, jax.random.split(key)[0], problem.params).backbone
        config = peft_files.settings(spec.lora, adapters, "") | {"inference_mode": False}
        adapted = peft.get_peft_model(self.model, peft.LoraConfig(**config))
        arrays = {name.replace(".weight", ".default.weight"): a for name, a in peft_files.arrays(adapters).items()}
        self.first = [torch.tensor(arrays[n]) for n, p in adapted.named_parameters() if p.requires_grad]
        self.own = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        self.rows = torch.tensor(problem.rows[:, 2:], dtype=torch.long, device=self.device)
        self.states = None if problem.states is None else torch.tensor(problem.states, device=self.device)
        t, total = spec.tuning, np.int32(problem.steps)
        factors = [train_step.learning_rate(t, np.int32(step), total) for step in range(problem.steps)]
        self.rates = [t.lora_rate * float(factor) for factor in factors]
        places = torch.arange(self.rows.shape[1], device=self.device)[None]
        with torch.no_grad():
            like = torch.zeros(1, places.shape[1], spec.architecture.width, dtype=self.dtype, device=self.device)
            self.rotary = self.model.model.rotary_emb(like, places)
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, tokens: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
        inner, begin = self.model.model, self.problem.query
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            x = inner.embed_tokens(tokens) if states is None else states.to(self.dtype)
            for layer in inner.layers[self.problem.spec.prefix :]:
                x = layer(x, attention_mask=None, position_embeddings=self.rotary)
            logits = self.model.lm_head(inner.norm(x[:, begin - 1 : -1]))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, begin:].flatten())

    def __call__(self) -> np.ndarray:
        """The loss of each step, from fresh adapters on."""
        with torch.no_grad():
            for parameter, value in zip(self.own, self.first, strict=True):
                parameter.copy_(value)
        optimizer, batch, losses = torch.optim.Adam(self.own, fused=True), self.problem.spec.tuning.batch, []
        for step, rate in enumerate(self.rates):
            rows = slice(step * batch, (step + 1) * batch)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(self.rows[rows], None if self.states is None else self.states[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().numpy()


def _llama(config: DecoderConfig, params: backbone_lib.Params) -> transformers.LlamaForCausalLM:
    """The model of transformers with our weights."""
    sizes = {"vocab_size": config.vocabulary, "hidden_size": config.width, "intermediate_size": config.mlp}
    sizes |= {"num_hidden_layers": config.depth, "num_attention_heads": config.heads, "head_dim": config.head_size}
    sizes |= {"num_key_value_heads": config.kv_heads, "max_position_embeddings": config.context}
    numerics = {"rms_norm_eps": config.epsilon, "rope_parameters": {"rope_theta": config.theta, "rope_type": "default"}}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **numerics, tie_word_embeddings=True))
    arrays = {}
    for name, leaf in flatten(params).items():
        for old, new in {"blocks/": "layers/", "attention/": "self_attn/", "/kernel": "_proj/weight"}.items():
            name = name.replace(old, new)
        name = name.replace("norm1/scale", "input_layernorm/weight").replace("scale", "weight")
        name = name.replace("norm2", "post_attention_layernorm").replace("embedding", "embed_tokens/weight")
        arrays[f"model.{name.replace('/', '.')}"] = torch.tensor(leaf.T.copy() if "_proj" in name else leaf)
    model.load_state_dict(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    return model.eval()


def main() -> None:
    parser = new_parser(__doc__, quick="short rounds, no torch.compile")
    parser.add_argument("--model", default="tinystories-656k", choices=MODELS)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="T, tokens of a row")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, at least 5")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rounds = CHECKED, 2
    warnings.simplefilter("ignore")  # of transformers and torch about themselves
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    problem = problem_of(arguments)
    with pinned():
        compared_sides = compared(problem, program_of(problem), arguments.rounds, compiled=not arguments.quick)
    result: dict = {name: getattr(arguments, name) for name in ("model", "batch", "tokens", "steps", "rounds")}
    result |= {"torch": torch.__version__, "peft": peft.__version__} | compared_sides
    deliver("bench_language.py", result, arguments.json)


def compared(problem: Problem, program: Program, rounds: int, compiled: bool) -> dict:
    """Tokens per second of each side, and how much faster ours is."""
    methods: dict = {"ours": lambda: program()[1][:, 0], "peft": Theirs(problem, compiled=False)}
    if compiled:
        methods["peft_compiled"] = Theirs(problem, compiled=True)
    losses = {name: run() for name, run in methods.items()}
    worst = max(float(np.abs(each / losses["ours"] - 1)[:CHECKED].max()) for each in losses.values())
    limit = TOLERANCE[jax.devices()[0].platform]
    assert worst < limit, f"losses differ by {worst:.1e}, more than {limit}: {losses}"
    seconds = interleaved(methods, rounds)
    rates, ratios = rates_and_ratios(seconds, problem.rows.shape[0] * problem.spec.input_spec.context)
    return {"losses_differ_by": worst, "tokens_per_s": rates, "ratio": ratios, "seconds": seconds}


if __name__ == "__main__":
    main()

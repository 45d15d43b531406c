"""All uses of private names of Megatron Core, and all patches of it or, because of it, of torch.

Private names may change with any version, so this package requires exactly one (`VERSION`). To upgrade: change it here,
in pyproject.toml and in constraints.txt, and run tests/platform/test_megatron_core.py. That reports which code in
`RELIES_ON` no longer exists, and for every function below has a test that fails without it.

The first part adapts Megatron Core to the CPU, only if torch has no CUDA device: Megatron Core requests the device
"cuda" by name, distinguishes tensors by their CUDA type names, and saves CUDA's random state. The second part is called
on any device by the modules that need it. No line at the top imports Megatron Core, since it has to be adapted first.
"""

import contextlib
import functools
import importlib
import logging
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

from megatron_tpt.errors import UserError

VERSION = "0.19.2"

RELIES_ON: dict[str, tuple[str, ...]] = {
    # CUDA by name: patch_tensor_factories, patch_tensor_moves, patch_device_calls.
    "optimizer/optimizer.py": (
        "self.found_inf = torch.tensor([0.0], dtype=torch.float, device='cuda')",
        "if param.type() in ['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor']:",
        "param_step = param_state.get('step', None)",  # load_without_step
        "param_group_identifier_keys = (",  # training/checkpoint.py: groups are paired by rates and decays
    ),
    "optimizer/clip_grads.py": (
        "total_norm = torch.zeros(1, dtype=torch.float, device='cuda')",
        "assert param.grad.type() == 'torch.cuda.FloatTensor'",
    ),
    "pipeline_parallel/schedules.py": ('total_num_tokens = torch.zeros([], dtype=torch.int, device="cuda")',),
    "transformer/utils.py": ('torch.ones(sq, sq, device="cuda")',),
    "dist_checkpointing/exchange_utils.py": (
        'tensor = torch.empty_like(tensor, device="cuda")',
        "all_loaded_tensors[shard_id] = all_loaded_tensors[shard_id].cuda()",
    ),
    "models/common/language_module/language_module.py": ("weight.data = weight.data.cuda()",),
    # Type names: patch_tensor_type_names.
    "transformer/module.py": ("_FLOAT_TYPES = (torch.FloatTensor, torch.cuda.FloatTensor)",),
    "optimizer/distrib_optimizer.py": (
        "elif model_param.type() == 'torch.cuda.FloatTensor':",
        'steps = list(set([s["step"].item() for s in inner_state_dict["state"].values()]))',  # load_without_step
        "if not isinstance(tensors[key], torch.Tensor):",  # load_without_step
        "step = torch.tensor(steps[0], dtype=torch.float)",  # training/checkpoint.py: one tensor for all parameters
        "def sharded_param_state_fully_reshardable(",  # training/fsdp_checkpoint.py has the same layout
        "# If we use FP8 params to initialize FP32 main params",  # models/precision.py: unrounded_values
    ),
    # Streams, the mesh and the number of the device: patch_fsdp, fsdp_construction_on_cpu.
    "distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py": (
        "self.side_stream_for_buffer_copy_and_grad_accum = torch.cuda.Stream()",
        'if self.device != torch.device(f"cuda:{torch.cuda.current_device()}"):',
    ),
    "distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py": ("with torch.cuda.stream(self.rs_stream):",),
    "distributed/fsdp/mcore_fsdp_adapter.py": ("device_mesh=DeviceMesh.from_group(",),
    # Random states: patch_random_state. Compilation: patch_jit.
    "tensor_parallel/random.py": ("def _get_cuda_rng_state(", "orig_rng_state = torch.cuda.get_rng_state()"),
    "jit.py": ("jit_fuser = torch.compile",),
    # What is worked around without a private name.
    "transformer/torch_norm.py": ("assert not config.sequence_parallel",),  # models/gpt/build.py: RMSNorm
    "transformer/attention.py": (
        "bias=self.config.add_bias_linear,",  # models/gpt/build.py: one switch for the biases of two parts
        "bias=self.config.add_bias_linear or self.config.add_qkv_bias,",
        "self._yarn_concentration_factor = _yarn_get_concentration_factor_from_config(config)",
    ),
    "tensor_parallel/layers.py": ("if config.gradient_accumulation_fusion and not _grad_accum_fusion_available:",),
    "distributed/distributed_data_parallel.py": (  # training/optimizer.py: buffers of whole matrices
        "ddp_config.bucket_size = max(40000000, 1000000 * dp_group.size())",
    ),
    # training/checkpoint.py writes in a process of its own: this worker asks for a CUDA device.
    "dist_checkpointing/strategies/async_utils.py": ("device=torch.cuda.current_device())",),
    "dist_checkpointing/strategies/filesystem_async.py": ("_results_queue = ctx.Manager().Queue()",),
}
"""Code of Megatron Core, by file, that this package works around or imitates, here or where a comment says."""

_adapted = False


def require_version() -> None:
    """Raises UserError unless Megatron Core is installed in the supported version."""
    try:
        from megatron.core.package_info import __file__ as place
        from megatron.core.package_info import __version__ as found
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("megatron"):
            raise
        raise UserError(f"Megatron Core is not installed: pip install megatron-core=={VERSION}") from None
    if found.partition("+")[0] != VERSION:  # after the "+" comes the commit of a source build
        raise UserError(
            f"Megatron Core {found} is installed ({place}), but this package requires {VERSION}: pip install "
            f"megatron-core=={VERSION}; if a container has another version, install it in a virtual environment with "
            f"access to the container's packages, and remove the container's Megatron from PYTHONPATH"
        )


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that uses the CPU if device="cuda" is requested."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _NoStream:
    """A CUDA stream whose work is always done: waiting for it returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_NoEvent":
        return _NoEvent()

    def synchronize(self) -> None: ...


class _NoEvent:
    """A CUDA event that is always complete."""

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces CUDA calls that have no meaning on a CPU."""


def patch_tensor_factories() -> None:
    """Factories with device="cuda": norms, token counts, masks, tensors that checkpoints exchange."""
    # `with torch.device(...)` looks up a factory in a set that torch fills on first use: fill it with the originals
    # now. Otherwise transformers, for example, loads models with some parts uninitialized.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def patch_tensor_moves() -> None:
    """`.cuda()` on tensors: the exchange of shards between ranks when loading, and tied embeddings."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def patch_tensor_type_names() -> None:
    """Optimizers and gradient clipping distinguish parameters and gradients by CUDA type names."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def patch_device_calls() -> None:
    """The current device and stream: optimizer/distrib_optimizer.py, distributed/param_and_grad_buffer.py,
    pipeline_parallel/p2p_communication.py, pipeline_parallel/schedules.py."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = _nothing
    torch.cuda.current_stream = _NoStream  # type: ignore[assignment, misc]


def patch_fsdp() -> None:
    """Megatron FSDP uses its own streams and a mesh of CUDA devices."""
    from torch.distributed.device_mesh import DeviceMesh

    torch.cuda.Stream = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, misc]
    from_group = DeviceMesh.from_group

    def from_group_on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if _is_cuda(device_type) else device_type, *args, **kwargs)

    DeviceMesh.from_group = from_group_on_cpu  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def fsdp_construction_on_cpu() -> Iterator[None]:
    """While Megatron FSDP is built, the current device is a number: FSDP compares its device with f"cuda:{number}", and
    warns that they differ, which is expected here."""
    log = logging.getLogger("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp")
    current_device, level = torch.cuda.current_device, log.level
    torch.cuda.current_device = lambda: 0
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
        log.setLevel(level)


def patch_random_state() -> None:
    """CUDA's random state becomes the CPU's."""
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed = torch.random.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[misc]
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def patch_jit() -> None:
    """Import Megatron Core with torch.compile off, its `jit_fuser`: importing the compiler takes seconds in every
    process, and compiling takes minutes without benefit for a CPU run.

    Call it before anything else imports Megatron Core: the decorator is applied at import.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        with contextlib.suppress(ModuleNotFoundError):  # require_version reports it
            importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


def adapt_megatron_to_cpu() -> None:
    """Make Megatron Core run on the CPU with gloo, after patch_jit has imported it; idempotent."""
    global _adapted
    if _adapted:
        return
    patch_tensor_factories()
    patch_tensor_moves()
    patch_tensor_type_names()
    patch_device_calls()
    patch_fsdp()
    patch_random_state()
    _adapted = True


def replace_results_queue() -> None:
    """Replace the queue for the results of a checkpoint writer, for which Megatron Core starts a process, by one within
    this process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


def before_finalizing(strategy: Any, prepare: Callable[[Any], None]) -> None:
    """Make a TorchDistSaveShardedStrategy call `prepare` with its writer before it puts the writer's functions into its
    request."""
    make_request = strategy._get_save_and_finalize_callbacks

    def prepare_and_make_request(writer: Any, *arguments: Any) -> Any:
        prepare(writer)
        return make_request(writer, *arguments)

    strategy._get_save_and_finalize_callbacks = prepare_and_make_request


def load_without_step(optimizer: Any) -> None:
    """Stop a DistributedOptimizer from looking for the `step` tensors of torch's AdamW in a checkpoint: Megatron Core
    stores the step in the parameter groups."""
    copy_into_state = optimizer._set_main_param_and_optimizer_states
    optimizer._set_main_param_and_optimizer_states = lambda parameter, tensors: copy_into_state(
        parameter, {**tensors, "step": None}
    )


def copy_main_weights_to_model(optimizer: Any) -> None:
    """Copy the main weights of a DistributedOptimizer, rounded, to the weights of the model, as after a step."""
    optimizer._copy_main_params_to_model_params()


def set_rotary_attention_factor(attention: Any, factor: float) -> None:
    """Set the factor on cosines and sines of one layer's attention; Megatron Core only sets it for its own YaRN."""
    assert hasattr(attention, "_yarn_concentration_factor")
    attention._yarn_concentration_factor = factor


def read_small_index(dataset: Any, max_bytes: int) -> None:
    """Replace the memory map that an IndexedDataset has of its .idx by a copy in memory, if it is no larger than
    `max_bytes`."""
    index = dataset.index
    if index.bin_buffer_mmap.nbytes <= max_bytes:
        for name in ("sequence_lengths", "sequence_pointers", "document_indices"):
            setattr(index, name, getattr(index, name).copy())
        del index.bin_buffer, index.bin_buffer_mmap


def indexes_samples[C: type](cls: C) -> C:
    """Class decorator: a GPTDataset gets its document, sample and shuffle index from its method `sample_arrays`."""
    cls._build_document_sample_shuffle_indices = cls.sample_arrays  # type: ignore[attr-defined]
    return cls


def indexes_blend[C: type](cls: C) -> C:
    """Class decorator: a BlendedDataset gets its dataset index and dataset sample index from its method
    `blend_arrays`."""
    cls._build_indices = cls.blend_arrays  # type: ignore[attr-defined]
    return cls

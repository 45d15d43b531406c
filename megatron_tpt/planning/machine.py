"""What a step is computed with: the numbers of data sheets, and the shares of them that training reaches."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tpt.errors import UserError
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.metrics import device_peak_tflops

# Bytes per second of the memory, and of NVLink in one direction, from NVIDIA's data sheets (which state both directions
# of NVLink together: 900 GB/s for H100).
_BANDWIDTHS = {
    "a100": (2.039e12, 300e9),
    "h100": (3.35e12, 450e9),
    "h200": (4.8e12, 450e9),
    "b200": (8.0e12, 900e9),
}
GPUS = tuple(_BANDWIDTHS)
"""The names that --gpu takes."""


@dataclass(frozen=True)
class Shares:
    """Which share of a peak is reached. The first two are fitted to the two published rows that have `fit`
    (planning/fit.py); the others are assumptions, the same for all rows."""

    gemm_bf16: float = 0.806
    """Of the bf16 peak, in matrix products; reading and writing the matrices is counted apart."""
    gemm_fp8: float = 0.713
    """Of the FP8 peak, in the same; casts are counted apart."""
    exposed_tensor: float = 0.5
    """Of the time of tensor-parallel communication that a step waits for with tp_comm_overlap."""
    attention: float = 0.41
    """Of the bf16 peak, in causal attention, forward and backward together. cuDNN, heads of 128, 8,192 tokens, H100
    (arXiv 2407.08608, the bars of figures 5 and 6): forward 529 TFLOP/s with the causal mask and 600 without, backward
    518 without it, taken to be 518 x 529 / 600 = 457 with it. The backward pass computes 2.5 times what the forward
    pass does, of which model FLOPs count 2: 3 / (1 / 529 + 2.5 / 457) = 407 TFLOP/s."""
    memory: float = 0.8
    """Of the bandwidth of the memory, in what moves values and computes little."""
    link: float = 0.8
    """Of the bandwidth of NVLink and of the network."""


@dataclass(frozen=True)
class Latencies:
    """Seconds before data move, by which NCCL itself chooses among its algorithms: rings, protocol Simple, in
    src/graph/tuning.cc of NCCL 2.27."""

    launch_s: float = 8.4e-6
    """Once, of a collective or of a message to one rank."""
    nvlink_s: float = 3.4e-6
    """From a rank to the next one in its node."""
    network_s: float = 14e-6
    """From a rank to the next one in another node."""


@dataclass(frozen=True)
class Link:
    """What connects a group of ranks."""

    name: str
    """NVLink, or network."""
    bytes_per_s: float
    """Of a rank."""
    latency_s: float
    """Of one collective of the group, or of one message to the next rank."""

    def seconds(self, num_bytes: float, num_messages: float) -> float:
        """The time of collectives or messages: their latencies, and the bytes that they send together."""
        return num_bytes / self.bytes_per_s + num_messages * self.latency_s


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs."""

    name: str
    """As CUDA names the GPU."""
    memory_bytes: int
    """Of one GPU."""
    peak_flops: dict[str, float]
    """FLOP/s of one GPU in dense matrix products, by precision: "bf16" and, where it has it, "fp8"."""
    memory_bandwidth: float
    """Bytes per second of one GPU's memory."""
    nvlink_bandwidth: float
    """Bytes per second that a GPU sends to the others of its node."""
    network_bandwidth: float
    """Bytes per second that a GPU sends to other nodes: every GPU has a network adapter of its own."""
    gpus_per_node: int = 8
    """GPUs that NVLink connects."""
    shares: Shares = Shares()
    latencies: Latencies = Latencies()

    def peak(self, precision: str) -> float:
        """FLOP/s in a precision. Raises UserError where the GPU has none."""
        if precision not in self.peak_flops:
            raise UserError(
                f"no peak is known of {self.name} in {precision}: give training.dtype=bfloat16 and, in place of fp8, "
                f"training.fp8=none"
            )
        return self.peak_flops[precision]

    def link(self, ranks: Sequence[int], *, is_ring: bool = True) -> Link:
        """The link that limits a group of ranks, of which every node has as many as the first.

        A group in one node has NVLink. Of a larger one the ranks in a node share their network adapters: NCCL's rings
        leave the node through each of them in turn, so that a rank gets as many adapters, at most NVLink. What a rank
        sends to another one, not by a ring of NCCL's, leaves through its own adapter.
        """
        ranks_in_node, shares, latencies = sum(rank < self.gpus_per_node for rank in ranks), self.shares, self.latencies
        steps = len(ranks) - 1 if is_ring else 1
        if ranks_in_node == len(ranks):
            latency = latencies.launch_s + steps * latencies.nvlink_s
            return Link("NVLink", self.nvlink_bandwidth * shares.link, latency)
        crossings = -(-len(ranks) // ranks_in_node) - 1 if is_ring else 1
        latency = latencies.launch_s + (steps - crossings) * latencies.nvlink_s + crossings * latencies.network_s
        adapters = ranks_in_node if is_ring else 1
        bandwidth = min(self.nvlink_bandwidth, adapters * self.network_bandwidth) * shares.link
        return Link("network", bandwidth, latency)


def machine_named(gpu: str, gpus_per_node: int = 8, network_gbit_per_s: float = 400.0) -> Machine:
    """Nodes with that GPU. Raises UserError for an unknown name."""
    if gpu not in _BANDWIDTHS:
        raise UserError(f"--gpu={gpu} is not known: give one of {', '.join(GPUS)}")
    device, (memory, nvlink) = find_device(gpu), _BANDWIDTHS[gpu]
    tflops = {precision: device_peak_tflops(device.name, precision) for precision in ("bf16", "fp8")}
    return Machine(
        name=device.name,
        memory_bytes=device.memory_bytes,
        peak_flops={precision: peak * 1e12 for precision, peak in tflops.items() if peak is not None},
        memory_bandwidth=memory,
        nvlink_bandwidth=nvlink,
        network_bandwidth=network_gbit_per_s / 8 * 1e9,
        gpus_per_node=gpus_per_node,
    )

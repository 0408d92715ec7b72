Tensor = tuple[int, int, int, int, int, int]
Sizes = tuple[int, int, int, int]

__version__: str

def cpu_isa() -> str: ...
def cpu_isa_reason() -> str: ...
def cuda_archs() -> str: ...
def cuda_device_count() -> int: ...
def copy_nontemporal(source: int, target: int, size: int, threads: int) -> None: ...
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def attention_forward_cpu(
    sizes: tuple[int, int, int, int, int, int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    alibi_slopes: Tensor,
    seed: Tensor,
    batch_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqlens_k: Tensor,
    sinks: Tensor,
    causal: int,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    p: float,
    head0: int,
    q0: int,
    k0: int,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    threads: int,
) -> None: ...
def attention_backward_cpu(
    sizes: tuple[int, int, int, int, int, int, int],
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    bias: Tensor,
    alibi_slopes: Tensor,
    seed: Tensor,
    batch_ids: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqlens_k: Tensor,
    sinks: Tensor,
    causal: int,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    p: float,
    head0: int,
    q0: int,
    k0: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dsinks: Tensor,
    dbias: Tensor,
    dbias_all_batches: bool,
    dbias_all_heads: bool,
    threads: int,
) -> None: ...
def reduce_in_order_cpu(sizes: tuple[int, ...], source: Tensor, target: Tensor) -> None: ...
def rotary_cpu(
    sizes: Sizes,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    each: bool,
    table: int,
    half: int,
    interleaved: bool,
    inverse: bool,
    out: Tensor,
    threads: int,
) -> None: ...
def int8_matmul_cpu(
    sizes: tuple[int, int, int],
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    group: int,
    bias: Tensor,
    activation: int,
    out: Tensor,
    threads: int,
) -> None: ...
def quantize_int8_cpu(
    sizes: Sizes,
    x: Tensor,
    group: int,
    seed: Tensor,
    given: Tensor,
    q: Tensor,
    scale: Tensor,
    most: Tensor,
    threads: int,
) -> None: ...

class PruneScores:
    def __init__(self, sizes: Sizes, score: Tensor, scale: Tensor, mask: Tensor, magnitude: bool) -> None: ...

def prune_select_cpu(scores: list[PruneScores], gone: int, threads: int) -> int: ...
def prune_rows_cpu(scores: PruneScores, gone: int, threads: int) -> int: ...
def prune_groups_cpu(scores: PruneScores, keep: int, m: int, threads: int) -> int: ...
def prune_transposable_cpu(scores: PruneScores, threads: int) -> int: ...
def prune_blocks_cpu(scores: PruneScores, high: int, wide: int, gone: int, threads: int) -> int: ...
def prune_histogram_cpu(scores: PruneScores, low: int, last: int, shift: int, threads: int) -> list[int]: ...
def prune_cut_cpu(scores: PruneScores, key: int, ties: int, threads: int) -> None: ...

class AdamW:
    def __init__(self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None: ...

def masked_adamw_cpu(
    rows: int,
    columns: int,
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    mask: Tensor,
    options: AdamW,
    grad_scale: Tensor,
    found_inf: Tensor,
    threads: int,
) -> None: ...
def apply_mask_cpu(sizes: Sizes, weight: Tensor, mask: Tensor, threads: int) -> None: ...
def mask_count_cpu(mask: Tensor, size: int, threads: int) -> int: ...
def mask_bits_cpu(source: Tensor, target: Tensor, rows: int, columns: int, packing: bool, threads: int) -> None: ...
def read_cpu(source: int, size: int, threads: int) -> None: ...
def dropout_add_norm_forward_cpu(
    sizes: Sizes,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    layerscale: Tensor,
    rowscale: Tensor,
    seed: Tensor,
    offset: Tensor,
    offset_per_row: bool,
    p: float,
    eps: float,
    weight_offset: float,
    norm: int,
    y: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None: ...
def dropout_add_norm_int8_cpu(
    sizes: Sizes,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    layerscale: Tensor,
    rowscale: Tensor,
    seed: Tensor,
    offset: Tensor,
    offset_per_row: bool,
    p: float,
    eps: float,
    weight_offset: float,
    norm: int,
    y: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    q: Tensor,
    q_scale: Tensor,
    threads: int,
) -> None: ...
def dropout_add_norm_backward_cpu(
    sizes: Sizes,
    dy: Tensor,
    dz: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    layerscale: Tensor,
    rowscale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor,
    offset: Tensor,
    offset_per_row: bool,
    p: float,
    weight_offset: float,
    norm: int,
    dx: Tensor,
    dresidual: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dlayerscale: Tensor,
    threads: int,
) -> None: ...

# With FASTLM_CUDA alone; missing otherwise. See csrc/fastlm.h.
def dropout_add_norm_forward_cuda(
    sizes: Sizes, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, layerscale: Tensor,
    rowscale: Tensor, seed: Tensor, offset: Tensor, offset_per_row: bool, p: float, eps: float, weight_offset: float,
    norm: int, y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, device: int, stream: int,
) -> None: ...  # fmt: skip
def dropout_add_norm_backward_cuda(
    sizes: Sizes, dy: Tensor, dz: Tensor, z: Tensor, x: Tensor, weight: Tensor, layerscale: Tensor,
    rowscale: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, offset: Tensor, offset_per_row: bool, p: float,
    weight_offset: float, norm: int, dx: Tensor, dresidual: Tensor, dweight: Tensor, dbias: Tensor, dlayerscale: Tensor,
    workspace: Tensor, device: int, stream: int,
) -> None: ...  # fmt: skip
def dropout_add_norm_parts_cuda(rows: int) -> int: ...

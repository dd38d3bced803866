# mypy: allow-untyped-defs
"""The Triton kernels of block-sparse attention. Import this only where triton is installed.

Both work on tokens in two orders. *Token order* is that of the model: view after view, special
tokens before patches. *Packed order* is all patches, view after view, then all special tokens;
there, a key block is one run of memory. Both count heads through the batch: ``b * heads + h``.
"""

import triton
import triton.language as tl


@triton.jit
def _patch_token(place, patches_per_view, special_per_view):
    """Token-order position of the patch at a place of the patch sequence."""
    return place + (place // patches_per_view + 1) * special_per_view


@triton.jit
def _special_token(place, patches_per_view, special_per_view):
    """Token-order position of the special token at a place of their sequence."""
    view = place // special_per_view
    return view * (patches_per_view + special_per_view) + place % special_per_view


@triton.jit(
    do_not_specialize=["num_patches", "num_special", "patches_per_view", "special_per_view"]
)
def pack_kernel(
    x_ptr,  # [B, heads, S, HEAD_DIM] in token order, any strides but 1 in the last dimension
    packed_ptr,  # the same in packed order, contiguous; written if COPY
    mean_ptr,  # fp32 [B, heads, blocks, HEAD_DIM] means over patch blocks; written if AVERAGE
    x_stride_b,
    x_stride_h,
    x_stride_t,
    num_heads,
    num_patches,
    num_special,
    patches_per_view,
    special_per_view,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    COPY: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """One program per (block, head): patch blocks first, then the special tokens in blocks."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    num_blocks = tl.cdiv(num_patches, BLOCK)
    is_patch = block < num_blocks
    first = tl.where(is_patch, block, block - num_blocks) * BLOCK
    length = tl.minimum(tl.where(is_patch, num_patches, num_special) - first, BLOCK)

    dims = tl.arange(0, HEAD_DIM)
    x_ptr += head // num_heads * x_stride_b + head % num_heads * x_stride_h
    packed_ptr += head * (num_patches + num_special) * HEAD_DIM
    total = tl.zeros([HEAD_DIM], tl.float32)
    for start in tl.range(0, BLOCK, TILE):
        inside = start + tl.arange(0, TILE)
        live = (inside < length)[:, None]
        if is_patch:
            token = _patch_token(first + inside, patches_per_view, special_per_view)
            target = first + inside
        else:
            token = _special_token(first + inside, patches_per_view, special_per_view)
            target = num_patches + first + inside
        x = tl.load(x_ptr + token[:, None].to(tl.int64) * x_stride_t + dims, live, other=0.0)
        if COPY:
            tl.store(packed_ptr + target[:, None].to(tl.int64) * HEAD_DIM + dims, x, live)
        total += tl.sum(x.to(tl.float32), 0)
    if AVERAGE:
        mean_ptr += (head * num_blocks + block) * HEAD_DIM
        tl.store(mean_ptr + dims, total / length, mask=is_patch & (dims >= 0))


@triton.jit
def _accumulate(acc, row_sum, row_max, q, k, v, qk_scale, valid, MASK: tl.constexpr):
    """Take one tile of keys into the running softmax; scores are in units of log 2."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * qk_scale)
    weights = tl.exp2(scores * qk_scale - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit(
    do_not_specialize=[
        "heads_ptr",
        "num_launched_heads",
        "num_q_blocks",
        "num_kv_blocks",
        "num_patches",
        "num_special",
        "patches_per_view",
        "special_per_view",
    ]
)
def attention_kernel(
    q_ptr,  # [B, heads, S, HEAD_DIM] in token order, any strides but 1 in the last dimension
    k_ptr,  # [B, heads, S, HEAD_DIM] in packed order, contiguous
    v_ptr,  # like k_ptr
    out_ptr,  # like q_ptr
    lse_ptr,  # fp32 [B, heads, S] in token order, contiguous
    row_offsets_ptr,  # int64 [B * heads * num_q_blocks + 1]
    indices_ptr,  # int32 [nnz], ascending within a row
    every_block_ptr,  # int32 [num_kv_blocks], 0, 1, 2, ...: the list of a special query
    heads_ptr,  # int64 [num_launched_heads], the heads to compute, in order of launch
    q_stride_b,
    q_stride_h,
    q_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    qk_scale,  # log2(e) / sqrt(HEAD_DIM)
    num_heads,
    num_launched_heads,
    num_q_blocks,
    num_kv_blocks,
    num_patches,
    num_special,
    patches_per_view,
    special_per_view,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_KV: tl.constexpr,
):
    """One program per tile of queries: tiles of special queries of all heads, then head by head.

    The keys of a row are those of its listed blocks, one after the other, then the special ones:
    one sequence, walked in tiles of TILE_KV whatever BLOCK_KV is. Only its last listed block can
    be partial, so every tile but those at the end is full and needs no mask.
    """
    TILES_PER_BLOCK: tl.constexpr = (BLOCK_Q + TILE_Q - 1) // TILE_Q
    program = tl.program_id(0)
    special_tiles = tl.cdiv(num_special, TILE_Q)
    special_programs = num_launched_heads * special_tiles
    if program < special_programs:
        head = tl.load(heads_ptr + program // special_tiles)
        place = program % special_tiles * TILE_Q + tl.arange(0, TILE_Q)
        live = place < num_special
        token = _special_token(place, patches_per_view, special_per_view)
        blocks_ptr = every_block_ptr
        num_listed = num_patches
    else:
        tile = program - special_programs
        tiles_per_head = num_q_blocks * TILES_PER_BLOCK
        head = tl.load(heads_ptr + tile // tiles_per_head)
        tile = tile % tiles_per_head
        block = tile // TILES_PER_BLOCK
        inside = tile % TILES_PER_BLOCK * TILE_Q + tl.arange(0, TILE_Q)
        place = block * BLOCK_Q + inside
        live = (inside < BLOCK_Q) & (place < num_patches)
        token = _patch_token(place, patches_per_view, special_per_view)
        row = head * num_q_blocks + block
        begin = tl.load(row_offsets_ptr + row)
        end = tl.load(row_offsets_ptr + row + 1)
        blocks_ptr = indices_ptr + begin
        num_listed = (end - begin).to(tl.int32) * BLOCK_KV
        last = tl.load(indices_ptr + end - 1, mask=end > begin, other=-1)
        if last == num_kv_blocks - 1:
            num_listed -= num_kv_blocks * BLOCK_KV - num_patches

    dims = tl.arange(0, HEAD_DIM)
    in_tile = tl.arange(0, TILE_KV)
    batch, head_in_batch = head // num_heads, head % num_heads
    q_ptr += batch * q_stride_b + head_in_batch * q_stride_h
    q = tl.load(
        q_ptr + token[:, None].to(tl.int64) * q_stride_t + dims, mask=live[:, None], other=0.0
    )
    packed = head * (num_patches + num_special) * HEAD_DIM
    k_ptr += packed
    v_ptr += packed
    acc = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)
    row_sum = tl.zeros([TILE_Q], tl.float32)
    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)

    num_full = num_listed // TILE_KV * TILE_KV
    for start in tl.range(0, num_full, TILE_KV):
        if BLOCK_KV % TILE_KV == 0:
            first = tl.load(blocks_ptr + start // BLOCK_KV) * BLOCK_KV + start % BLOCK_KV
            key = first + in_tile
        else:
            key = start + in_tile
            key = tl.load(blocks_ptr + key // BLOCK_KV) * BLOCK_KV + key % BLOCK_KV
        offsets = key[:, None] * HEAD_DIM + dims
        k = tl.load(k_ptr + offsets)
        v = tl.load(v_ptr + offsets)
        acc, row_sum, row_max = _accumulate(acc, row_sum, row_max, q, k, v, qk_scale, None, False)

    num_keys = num_listed + num_special
    for start in tl.range(num_full, num_keys, TILE_KV):
        key = start + in_tile
        valid = key < num_keys
        listed = key < num_listed
        block = tl.load(blocks_ptr + key // BLOCK_KV, mask=listed, other=0)
        key = tl.where(listed, block * BLOCK_KV + key % BLOCK_KV, num_patches + key - num_listed)
        offsets = key[:, None] * HEAD_DIM + dims
        # Masked keys must be read as 0: weights of 0 do not undo a NaN.
        k = tl.load(k_ptr + offsets, mask=valid[:, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=valid[:, None], other=0.0)
        acc, row_sum, row_max = _accumulate(acc, row_sum, row_max, q, k, v, qk_scale, valid, True)

    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += batch * out_stride_b + head_in_batch * out_stride_h
    tl.store(out_ptr + token[:, None].to(tl.int64) * out_stride_t + dims, out, mask=live[:, None])
    lse = (row_max + tl.log2(row_sum)) * 0.6931471805599453
    tl.store(lse_ptr + head * (num_patches + num_special) + token, lse, mask=live)

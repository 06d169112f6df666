/**
 * Owns the checks that stand between messages from other machines and kernels that index memory.
 *
 * Invariants
 * 1. A CheckedPlan has no index outside the slab, q, k, v or out, whatever the plan said.
 * 2. Every query row belongs to exactly one segment of a CheckedPlan (rows of no request get a segment without blocks).
 * 3. No two kv rows share a slot, and no two blocks of a segment share a position.
 */
import {
  attendBytes,
  BLOCK_FIELDS,
  type KvLayout,
  LaminaError,
  partialBytes,
  SEGMENT_FIELDS,
  type StepPlan,
} from '@lamina/tensor';

const MAX_POSITION = 2 ** 31 - 1;

/** A copy of a plan that kernels may trust. */
export type CheckedPlan = StepPlan;

function violation(what: string): LaminaError {
  return new LaminaError('protocol_violation', `attention step plan: ${what}`);
}

function checkCount(name: string, value: number): void {
  if (!Number.isInteger(value) || value < 0 || value > MAX_POSITION) {
    throw violation(`${name} is ${value}; it must be an integer of at least 0`);
  }
}

/** Says what is wrong with the block at `i`. Apart from the loop, which then compiles to a few compares per block. */
function blockViolation(blocks: Int32Array, i: number, blockSize: number, numBlocks: number): LaminaError {
  const where = `blocks[${i / BLOCK_FIELDS}]`;
  const physicalBlock = blocks[i]!;
  if (physicalBlock < 0 || physicalBlock >= numBlocks) {
    return violation(`${where} has physicalBlock ${physicalBlock}; this shard has ${numBlocks} blocks`);
  }
  const firstPosition = blocks[i + 1]!;
  if (firstPosition < 0 || firstPosition % blockSize !== 0 || firstPosition > MAX_POSITION - blockSize) {
    return violation(`${where} has firstPosition ${firstPosition}; it must be a multiple of ${blockSize}`);
  }
  return violation(`${where} has numTokens ${blocks[i + 2]!}; a block holds at most ${blockSize}`);
}

function checkBlocks(blocks: Int32Array, layout: KvLayout, numBlocks: number): void {
  const blockSize = layout.blockSizeTokens;
  const lastPosition = MAX_POSITION - blockSize;
  // A block right after the one before needs no division to be known as a multiple.
  let expectedPosition = 0;
  for (let i = 0; i < blocks.length; i += BLOCK_FIELDS) {
    const physicalBlock = blocks[i]!;
    const firstPosition = blocks[i + 1]!;
    const numTokens = blocks[i + 2]!;
    if (
      physicalBlock < 0 ||
      physicalBlock >= numBlocks ||
      firstPosition < 0 ||
      firstPosition > lastPosition ||
      (firstPosition !== expectedPosition && firstPosition % blockSize !== 0) ||
      numTokens < 0 ||
      numTokens > blockSize
    ) {
      throw blockViolation(blocks, i, blockSize, numBlocks);
    }
    expectedPosition = firstPosition + blockSize;
  }
}

function checkSegments(plan: CheckedPlan): Uint8Array {
  const { segments, blocks, numQueryRows } = plan;
  const numBlockRefs = blocks.length / BLOCK_FIELDS;
  const covered = new Uint8Array(numQueryRows);
  for (let i = 0; i < segments.length; i += SEGMENT_FIELDS) {
    const queryRowStart = segments[i]!;
    const numQueries = segments[i + 1]!;
    const firstPosition = segments[i + 2]!;
    const blockStart = segments[i + 3]!;
    const numSegmentBlocks = segments[i + 4]!;
    if (queryRowStart < 0 || numQueries < 0 || queryRowStart + numQueries > numQueryRows) {
      throw violation(
        `segments[${i / SEGMENT_FIELDS}] covers rows ${queryRowStart} + ${numQueries} of ${numQueryRows}`,
      );
    }
    if (firstPosition < 0 || firstPosition > MAX_POSITION - numQueries) {
      throw violation(`segments[${i / SEGMENT_FIELDS}] has firstPosition ${firstPosition}`);
    }
    if (blockStart < 0 || numSegmentBlocks < 0 || blockStart + numSegmentBlocks > numBlockRefs) {
      throw violation(
        `segments[${i / SEGMENT_FIELDS}] uses blocks ${blockStart} + ${numSegmentBlocks} of ${numBlockRefs}`,
      );
    }
    for (let row = queryRowStart; row < queryRowStart + numQueries; row++) {
      if (covered[row] === 1)
        throw violation(`segments[${i / SEGMENT_FIELDS}] covers query row ${row}, which another segment has`);
      covered[row] = 1;
    }
    let previous = -1;
    const end = (blockStart + numSegmentBlocks) * BLOCK_FIELDS;
    for (let at = blockStart * BLOCK_FIELDS; at < end; at += BLOCK_FIELDS) {
      const position = blocks[at + 1]!;
      if (position <= previous) {
        const block = at / BLOCK_FIELDS;
        throw violation(
          `blocks[${block}] has firstPosition ${position}, not above ${previous} before it in segments[${i / SEGMENT_FIELDS}]`,
        );
      }
      previous = position;
    }
  }
  return covered;
}

function checkSlots(kvSlots: Int32Array, numSlots: number): void {
  let previous = -1;
  let isAscending = true;
  for (let row = 0; row < kvSlots.length; row++) {
    const slot = kvSlots[row]!;
    if (slot < 0 || slot >= numSlots) {
      throw violation(`kvSlots[${row}] is ${slot}; this shard has ${numSlots} slots`);
    }
    if (slot <= previous) isAscending = false;
    previous = slot;
  }
  if (isAscending) return;
  const sorted = kvSlots.slice().sort();
  for (let i = 1; i < sorted.length; i++) {
    const slot = sorted[i]!;
    if (slot !== sorted[i - 1]) continue;
    const row = kvSlots.indexOf(slot, kvSlots.indexOf(slot) + 1);
    throw violation(`kvSlots[${row}] is ${slot}, which an earlier row has`);
  }
}

/** `segments` plus one segment without blocks per run of rows that no segment covers. */
function coverAllRows(segments: Int32Array, covered: Uint8Array): Int32Array {
  const added: number[] = [];
  for (let row = covered.indexOf(0); row >= 0; ) {
    let end = covered.indexOf(1, row);
    if (end < 0) end = covered.length;
    added.push(row, end - row, 0, 0, 0);
    row = covered.indexOf(0, end);
  }
  if (added.length === 0) return segments;
  const all = new Int32Array(segments.length + added.length);
  all.set(segments);
  all.set(added, segments.length);
  return all;
}

/** Copies the plan and checks the copy. Throws LaminaError('protocol_violation') naming the first bad entry. */
export function checkPlan(plan: StepPlan, layout: KvLayout, numBlocks: number): CheckedPlan {
  checkCount('numQueryRows', plan.numQueryRows);
  checkCount('numKvRows', plan.numKvRows);
  const copy: CheckedPlan = {
    numQueryRows: plan.numQueryRows,
    numKvRows: plan.numKvRows,
    segments: plan.segments.slice(),
    blocks: plan.blocks.slice(),
    kvSlots: plan.kvSlots.slice(),
  };
  if (copy.segments.length % SEGMENT_FIELDS !== 0) {
    throw violation(`segments has ${copy.segments.length} numbers, not a multiple of ${SEGMENT_FIELDS}`);
  }
  if (copy.blocks.length % BLOCK_FIELDS !== 0) {
    throw violation(`blocks has ${copy.blocks.length} numbers, not a multiple of ${BLOCK_FIELDS}`);
  }
  if (copy.kvSlots.length !== copy.numKvRows) {
    throw violation(`kvSlots has ${copy.kvSlots.length} numbers for ${copy.numKvRows} kv rows`);
  }
  checkBlocks(copy.blocks, layout, numBlocks);
  const covered = checkSegments(copy);
  checkSlots(copy.kvSlots, numBlocks * layout.blockSizeTokens);
  return { ...copy, segments: coverAllRows(copy.segments, covered) };
}

/** Throws unless `layer`, `qkv` and `out` fit the step. */
export function checkAttend(
  plan: CheckedPlan,
  layout: KvLayout,
  layer: number,
  qkv: Uint8Array,
  out: Uint8Array,
): void {
  if (!Number.isInteger(layer) || layer < 0 || layer >= layout.numLayers) {
    throw new LaminaError('protocol_violation', `attend: layer ${layer} of a model with ${layout.numLayers} layers`);
  }
  const qkvBytes = attendBytes(plan, layout);
  if (qkv.byteLength !== qkvBytes) {
    throw new LaminaError('protocol_violation', `attend: qkv has ${qkv.byteLength} bytes, the step needs ${qkvBytes}`);
  }
  const outBytes = partialBytes(plan.numQueryRows, layout);
  if (out.byteLength !== outBytes) {
    throw new LaminaError('protocol_violation', `attend: out has ${out.byteLength} bytes, the step needs ${outBytes}`);
  }
}

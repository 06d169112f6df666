/**
 * Owns the step plan on the wire, sent to a shard once per step.
 *
 * Body: int32 little-endian: numQueryRows, numKvRows, numSegments, numBlocks, then segments, blocks, kvSlots.
 *
 * Invariants
 * 1. A shard keeps no table between steps: the plan lists every block it is to read.
 * 2. Counts are checked before anything is made of them.
 */
import { BLOCK_FIELDS, LaminaError, SEGMENT_FIELDS, type StepPlan } from '@lamina/tensor';
import { FRAME_HEADER_BYTES } from './frame.ts';
import { LIMITS } from './limits.ts';

const COUNTS = 4;

/** One message with room for the header in front; whoever sends it writes that. */
export function encodeStepPlan(plan: StepPlan): Uint8Array<ArrayBuffer> {
  const numInts = COUNTS + plan.segments.length + plan.blocks.length + plan.kvSlots.length;
  const message = new Uint8Array(FRAME_HEADER_BYTES + numInts * 4);
  const ints = new Int32Array(message.buffer, FRAME_HEADER_BYTES, numInts);
  ints[0] = plan.numQueryRows;
  ints[1] = plan.numKvRows;
  ints[2] = plan.segments.length / SEGMENT_FIELDS;
  ints[3] = plan.blocks.length / BLOCK_FIELDS;
  ints.set(plan.segments, COUNTS);
  ints.set(plan.blocks, COUNTS + plan.segments.length);
  ints.set(plan.kvSlots, COUNTS + plan.segments.length + plan.blocks.length);
  return message;
}

/**
 * Decodes a plan's body; the arrays are copies, aligned. Indices into KV memory are checked by the kernel, which knows it.
 * @throws LaminaError `protocol_violation`
 */
export function decodeStepPlan(body: Uint8Array): StepPlan {
  if (body.length < COUNTS * 4 || body.length % 4 !== 0) throw badPlan(`a body of ${body.length} bytes`);
  // Not `slice`: what NATS delivers is a Buffer, whose slice is a view.
  const ints = new Int32Array(new Uint8Array(body).buffer);
  const numQueryRows = count(ints[0]!, LIMITS.planRows, 'query rows');
  const numKvRows = count(ints[1]!, LIMITS.planRows, 'KV rows');
  const numSegments = count(ints[2]!, LIMITS.planSegments, 'segments');
  const numBlocks = count(ints[3]!, LIMITS.planBlocks, 'blocks');
  const blocksAt = COUNTS + numSegments * SEGMENT_FIELDS;
  const slotsAt = blocksAt + numBlocks * BLOCK_FIELDS;
  if (ints.length !== slotsAt + numKvRows) throw badPlan(`${ints.length} integers where ${slotsAt + numKvRows} belong`);
  return {
    numQueryRows,
    numKvRows,
    segments: ints.subarray(COUNTS, blocksAt),
    blocks: ints.subarray(blocksAt, slotsAt),
    kvSlots: ints.subarray(slotsAt),
  };
}

function count(value: number, limit: number, what: string): number {
  if (value < 0 || value > limit) throw badPlan(`${value} ${what}; 0 to ${limit} are taken`);
  return value;
}

function badPlan(what: string): LaminaError {
  return new LaminaError('protocol_violation', `bad step plan: ${what}`);
}

/**
 * Owns turning the entries of a step into what a worker runs: token ids, positions, sampled rows, and per shard its plan.
 *
 * Invariants
 * 1. A shard gets the queries of exactly the requests that have blocks on it, and the K and V that it is to store.
 * 2. Every block that holds a token which some layer shows to a query of its request's entry is in exactly one plan, and
 *    no other block is in any.
 * 3. Shards come in order of their first block, so the same tables give the same order.
 */
import { BLOCK_FIELDS, encodeStepPlan } from '@lamina/protocol';
import type { ShardPart, StepRequest } from '../worker/messages.ts';
import type { Scheduler, StepEntry } from './scheduler.ts';

class PlanBuilder {
  readonly shardId: string;
  readonly segments: number[] = [];
  readonly blocks: number[] = [];
  readonly kvSlots: number[] = [];
  readonly queryRows: number[] = [];
  readonly kvRows: number[] = [];
  #entry = -1;
  #numBlocksAt = 0;

  constructor(shardId: string) {
    this.shardId = shardId;
  }

  /** A block of entry number `entry`, whose queries are rows [row, row + numQueries). */
  addBlock(
    entry: number,
    row: number,
    numQueries: number,
    start: number,
    block: number,
    firstPosition: number,
    numTokens: number,
  ): void {
    if (this.#entry !== entry) {
      this.#entry = entry;
      this.segments.push(this.queryRows.length, numQueries, start, this.blocks.length / BLOCK_FIELDS, 0);
      this.#numBlocksAt = this.segments.length - 1;
      for (let i = 0; i < numQueries; i++) this.queryRows.push(row + i);
    }
    this.segments[this.#numBlocksAt]!++;
    this.blocks.push(block, firstPosition, numTokens);
  }

  build(): ShardPart {
    const plan = {
      numQueryRows: this.queryRows.length,
      numKvRows: this.kvRows.length,
      segments: Int32Array.from(this.segments),
      blocks: Int32Array.from(this.blocks),
      kvSlots: Int32Array.from(this.kvSlots),
    };
    return {
      shardId: this.shardId,
      plan: encodeStepPlan(plan),
      queryRows: Int32Array.from(this.queryRows),
      kvRows: Int32Array.from(this.kvRows),
    };
  }
}

/** What a step depends on besides its entries. */
type StepShape = Pick<Scheduler, 'blockSizeTokens' | 'windowTokens'> & Partial<Pick<Scheduler, 'shortSequences'>>;

/** @returns The step and the buffers in it that can be transferred to the worker. */
export function buildStep(
  entries: readonly StepEntry[],
  { blockSizeTokens, windowTokens, shortSequences = null }: StepShape,
  waveIndex: number,
  stepId: number,
  leaseTerm: number,
): { step: StepRequest; transfer: ArrayBuffer[] } {
  let numTokens = 0;
  for (const entry of entries) numTokens += entry.numTokens;
  const tokenIds = new BigInt64Array(numTokens);
  const positionIds = new BigInt64Array(numTokens);
  const sampledRows: number[] = [];
  const sampling: number[] = [];
  const builders = new Map<string, PlanBuilder>();
  let row = 0;
  entries.forEach(({ request, start, numTokens: count, draft }, entryIndex) => {
    const end = start + count;
    const numKnownTokens = request.tokens.length;
    const isShort = shortSequences !== null && request.tokens.length <= shortSequences.numTokens;
    const offset = isShort ? shortSequences.offset : 0;
    for (let position = start; position < end; position++) {
      tokenIds[row + position - start] = BigInt(request.tokens[position] ?? draft[position - numKnownTokens]!);
      positionIds[row + position - start] = BigInt(position + offset);
    }
    const firstVisible = Math.max(0, start - windowTokens + 1);
    for (let index = Math.floor(firstVisible / blockSizeTokens); index * blockSizeTokens < end; index++) {
      const { shardId, block } = request.blockTable[index - request.numTrimmedBlocks]!;
      let builder = builders.get(shardId);
      if (builder === undefined) {
        builder = new PlanBuilder(shardId);
        builders.set(shardId, builder);
      }
      const firstPosition = index * blockSizeTokens;
      const lastPosition = Math.min(firstPosition + blockSizeTokens, end);
      builder.addBlock(entryIndex, row, count, start, block, firstPosition, lastPosition - firstPosition);
      for (let position = Math.max(start, firstPosition); position < lastPosition; position++) {
        builder.kvSlots.push(block * blockSizeTokens + position - firstPosition);
        builder.kvRows.push(row + position - start);
      }
    }
    if (end >= numKnownTokens) {
      const { temperature, topP, topK, minP, seed } = request.item.sampling;
      for (let ahead = 0; ahead <= draft.length; ahead++) {
        sampledRows.push(row + numKnownTokens - 1 - start + ahead);
        sampling.push(temperature, topP, topK, minP, seed, request.answer.numTokens + ahead);
        sampling.push(request.item.logprobs ?? -1, ahead < draft.length ? 1 : 0);
      }
    }
    row += count;
  });
  const step: StepRequest = {
    kind: 'step',
    waveIndex,
    stepId,
    leaseTerm,
    tokenIds,
    positionIds,
    sampledRows: Int32Array.from(sampledRows),
    sampling: Float64Array.from(sampling),
    shards: [...builders.values()].map((builder) => builder.build()),
  };
  const transfer = [tokenIds.buffer, positionIds.buffer, step.sampledRows.buffer, step.sampling.buffer];
  for (const shard of step.shards) transfer.push(shard.plan.buffer, shard.queryRows.buffer, shard.kvRows.buffer);
  return { step, transfer };
}

/**
 * Owns turning the entries of a step into what a worker runs: token ids, positions, sampled rows, and per shard its plan.
 *
 * Invariants
 * 1. A shard gets the queries of exactly the requests that have blocks on it, and the K and V that it is to store.
 * 2. Every block that holds a token which some layer shows to a query of its request's entry is in exactly one plan, and
 *    no other block is in any.
 * 3. Shards come in order of their first block, so the same tables give the same order.
 * 4. The queries of a prefill chunk that begins at a block see the chunk's own tokens here (SelfPart), and on shards only
 *    what lies before it: a token is seen in one place.
 */

import { encodeStepPlan } from '@lamina/protocol';
import { BLOCK_FIELDS } from '@lamina/tensor';
import type { SelfPart, ShardPart, StepRequest } from '../worker/messages.ts';
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

/** The chunks of a step that see themselves, over scratch blocks that are numbered from 0. */
class SelfBuilder {
  readonly #segments: number[] = [];
  readonly #blocks: number[] = [];
  readonly #kvSlots: number[] = [];
  readonly #rows: number[] = [];

  /** Tokens [start, start + numTokens) of a request, rows [row, row + numTokens) of the wave. */
  addChunk(row: number, start: number, numTokens: number, blockSizeTokens: number): void {
    const firstBlock = this.#blocks.length / BLOCK_FIELDS;
    const numBlocks = Math.ceil(numTokens / blockSizeTokens);
    this.#segments.push(this.#rows.length, numTokens, start, firstBlock, numBlocks);
    for (let i = 0; i < numBlocks; i++) {
      const numBefore = i * blockSizeTokens;
      this.#blocks.push(firstBlock + i, start + numBefore, Math.min(blockSizeTokens, numTokens - numBefore));
    }
    for (let i = 0; i < numTokens; i++) {
      this.#rows.push(row + i);
      this.#kvSlots.push(firstBlock * blockSizeTokens + i);
    }
  }

  build({ blockSizeTokens, kvDtype }: Pick<Scheduler, 'blockSizeTokens' | 'kvDtype'>): SelfPart | null {
    const numRows = this.#rows.length;
    if (numRows === 0) return null;
    return {
      plan: {
        numQueryRows: numRows,
        numKvRows: numRows,
        segments: Int32Array.from(this.#segments),
        blocks: Int32Array.from(this.#blocks),
        kvSlots: Int32Array.from(this.#kvSlots),
      },
      rows: Int32Array.from(this.#rows),
      numBlocks: this.#blocks.length / BLOCK_FIELDS,
      blockSizeTokens,
      kvDtype,
    };
  }
}

/** Fewer rows are not worth two places to attend to. */
const MIN_SELF_TOKENS = 16;

/** Whether the executor computes the attention of an entry to itself. */
function seesItself({ request, start, numTokens }: StepEntry, blockSizeTokens: number): boolean {
  return request.phase === 'prefill' && numTokens >= MIN_SELF_TOKENS && start % blockSizeTokens === 0;
}

/** What a step depends on besides its entries. */
type StepShape = Pick<Scheduler, 'blockSizeTokens' | 'windowTokens' | 'kvDtype'> &
  Partial<Pick<Scheduler, 'shortSequences'>>;

/** @returns The step and the buffers in it that can be transferred to the worker. */
export function buildStep(
  entries: readonly StepEntry[],
  { blockSizeTokens, windowTokens, kvDtype, shortSequences = null }: StepShape,
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
  const self = new SelfBuilder();
  let row = 0;
  entries.forEach((entry, entryIndex) => {
    const { request, start, numTokens: count, draft } = entry;
    const end = start + count;
    const isSelf = seesItself(entry, blockSizeTokens);
    if (isSelf) self.addChunk(row, start, count, blockSizeTokens);
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
      if (!isSelf || firstPosition < start)
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
    kvDtype,
    shards: [...builders.values()].map((builder) => builder.build()),
    self: self.build({ blockSizeTokens, kvDtype }),
  };
  const transfer = [tokenIds.buffer, positionIds.buffer, step.sampledRows.buffer, step.sampling.buffer];
  for (const shard of step.shards) transfer.push(shard.plan.buffer, shard.queryRows.buffer, shard.kvRows.buffer);
  return { step, transfer };
}

/** Continuous batching and step plans: budgets, fairness, and that every token and block is in its place. */

import { decodeStepPlan, FRAME_HEADER_BYTES } from '@lamina/protocol';
import { BLOCK_FIELDS, SEGMENT_FIELDS } from '@lamina/tensor';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Scheduler } from '../src/scheduling/scheduler.ts';
import { buildStep } from '../src/scheduling/step-builder.ts';
import { SAMPLING_FIELDS, type SelfPart } from '../src/worker/messages.ts';
import { BLOCK, request } from './requests.ts';

function scheduler(
  numWaves: number,
  limits = { maxBatchedTokens: 64, prefillChunkTokens: 32 },
  speculation: 'auto' | 'off' = 'off',
): Scheduler {
  // A worker each: its first wave is always used.
  const made = new Scheduler({ ...limits, speculation }, numWaves, numWaves);
  made.blockSizeTokens = BLOCK;
  return made;
}

describe('Scheduler', () => {
  it('runs decodes first and prefill chunks in what is left of the budget', () => {
    const subject = scheduler(1);
    const long = request({ numPromptTokens: 100 });
    const other = request({ numPromptTokens: 100 });
    const decoding = Array.from({ length: 3 }, () =>
      request({ numPromptTokens: 20, numComputed: 19, phase: 'decode' }),
    );
    for (const each of [long, other, ...decoding]) subject.add(each);
    expect(subject.formStep(0).map(({ request: { id }, start, numTokens }) => [id, start, numTokens])).toEqual([
      ...decoding.map(({ id }) => [id, 19, 1]),
      [long.id, 0, 32],
      [other.id, 0, 16],
    ]);
  });

  it("uses a worker's second wave when its first is full enough", () => {
    const subject = new Scheduler({ maxBatchedTokens: 64, prefillChunkTokens: 32, speculation: 'off' }, 4, 2);
    subject.blockSizeTokens = BLOCK;
    const requests = Array.from({ length: 49 }, () =>
      request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' }),
    );
    const countsAfter: number[][] = [];
    for (const each of requests) {
      subject.add(each);
      countsAfter.push([0, 1, 2, 3].map((wave) => subject.requestsOf(wave).length));
    }
    // Waves 0 and 2 are the first of their workers.
    expect(countsAfter[31]).toEqual([16, 0, 16, 0]);
    expect(countsAfter[47]).toEqual([16, 16, 16, 0]);
    expect(countsAfter[48]).toEqual([16, 16, 16, 1]);
    subject.formStep(3);
    expect(subject.requestsOf(3).length).toBeGreaterThan(10);
    // Few are left, some of them in a step of a second wave: its next one is none, and the first waves have all.
    const left = requests.filter((_, i) => i % 5 === 0);
    for (const each of requests) if (!left.includes(each)) subject.remove(each);
    expect(subject.requestsOf(1).length + subject.requestsOf(3).length).toBeGreaterThan(0);
    for (const wave of [1, 3]) expect(subject.formStep(wave)).toEqual([]);
    expect(subject.formStep(0).length + subject.formStep(2).length).toBe(left.length);
  });

  it('leaves nobody behind in a wave that is no longer used, in whatever order waves are asked', () => {
    for (const order of [
      [0, 1],
      [1, 0],
    ]) {
      const subject = new Scheduler({ maxBatchedTokens: 64, prefillChunkTokens: 32, speculation: 'off' }, 2, 1);
      subject.blockSizeTokens = BLOCK;
      const requests = Array.from({ length: 17 }, () =>
        request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' }),
      );
      for (const each of requests) subject.add(each);
      const last = subject.requestsOf(1)[0]!;
      last.isInStep = true;
      for (const each of requests) if (each !== last) subject.remove(each);
      // While the step of the last one runs, the other wave is asked and has nothing.
      expect(subject.formStep(0)).toEqual([]);
      last.isInStep = false;
      expect(order.flatMap((wave) => subject.formStep(wave)).map((entry) => entry.request)).toEqual([last]);
    }
  });

  it('gives a prompt the whole step while nobody decodes, in any wave', () => {
    const subject = scheduler(2);
    const long = request({ numPromptTokens: 100 });
    subject.add(long);
    const chunk = () => subject.formStep(long.waveIndex).map(({ start, numTokens }) => [start, numTokens]);
    expect(chunk()).toEqual([[0, 64]]);
    subject.add(request({ numPromptTokens: 20, numComputed: 19, phase: 'decode' }));
    expect(chunk()).toEqual([[0, 32]]);
  });

  it('gives prompts the whole step while no more requests decode than prompts wait', () => {
    const subject = scheduler(1);
    const prompts = [request({ numPromptTokens: 100 }), request({ numPromptTokens: 100 })];
    for (const each of prompts) subject.add(each);
    const chunk = () => subject.formStep(0).find(({ request: { phase } }) => phase === 'prefill')?.numTokens;
    for (let numDecoding = 1; numDecoding <= 3; numDecoding++) {
      subject.add(request({ numPromptTokens: 20, numComputed: 19, phase: 'decode' }));
      expect(chunk()).toBe(numDecoding < 3 ? 48 : 32);
    }
  });

  it('ends a chunk at a block, so far as it can', () => {
    const subject = scheduler(1, { maxBatchedTokens: 40, prefillChunkTokens: 40 });
    const long = request({ numPromptTokens: 100 });
    subject.add(long);
    const chunks = [];
    while (long.numComputed < 100) {
      const [entry] = subject.formStep(0);
      chunks.push(entry!.numTokens);
      long.numComputed += entry!.numTokens;
    }
    expect(chunks).toEqual([32, 32, 36]);
    const tight = scheduler(1, { maxBatchedTokens: 5, prefillChunkTokens: 5 });
    const slow = request({ numPromptTokens: 100, numComputed: 14 });
    tight.add(slow);
    expect(tight.formStep(0)[0]!.numTokens).toBe(2);
    slow.numComputed = 16;
    expect(tight.formStep(0)[0]!.numTokens).toBe(5);
  });

  it('lets nobody starve when the budget is too small for all', () => {
    const subject = scheduler(1, { maxBatchedTokens: 3, prefillChunkTokens: 3 });
    const requests = Array.from({ length: 8 }, () => request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' }));
    for (const each of requests) subject.add(each);
    const turns = new Map<string, number>();
    for (let step = 0; step < 24; step++) {
      const entries = subject.formStep(0);
      expect(entries).toHaveLength(3);
      for (const entry of entries) turns.set(entry.request.id, (turns.get(entry.request.id) ?? 0) + 1);
    }
    expect([...turns.values()].every((count) => count >= 8)).toBe(true);
  });

  it('spreads requests over the waves and evens them out when some end', () => {
    const subject = scheduler(2);
    const requests = Array.from({ length: 6 }, () => request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' }));
    for (const each of requests) subject.add(each);
    expect(requests.map((each) => each.waveIndex)).toEqual([0, 1, 0, 1, 0, 1]);
    for (const each of requests) if (each.waveIndex === 1) subject.remove(each);
    expect(subject.formStep(1)).toHaveLength(1);
    expect(subject.formStep(0)).toHaveLength(2);
  });

  it('never moves or schedules a request that is in a step', () => {
    const subject = scheduler(2);
    const requests = Array.from({ length: 4 }, () => request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' }));
    for (const each of requests) subject.add(each);
    for (const each of requests) if (each.waveIndex === 1) subject.remove(each);
    for (const each of requests) each.isInStep = true;
    expect(subject.formStep(1)).toEqual([]);
    expect(subject.formStep(0)).toEqual([]);
  });

  it('waits for blocks instead of writing beyond the block table', () => {
    const subject = scheduler(1);
    const full = request({ numPromptTokens: 33, numComputed: 32, phase: 'decode', numBlocks: 2 });
    const partly = request({ numPromptTokens: 100, numBlocks: 1 });
    subject.add(full);
    subject.add(partly);
    expect(subject.formStep(0).map(({ request: { id }, numTokens }) => [id, numTokens])).toEqual([[partly.id, 16]]);
  });

  it('prefers higher priority', () => {
    const subject = scheduler(1, { maxBatchedTokens: 8, prefillChunkTokens: 8 });
    const low = request({ numPromptTokens: 20 });
    const high = request({ numPromptTokens: 20, priority: 5 });
    subject.add(low);
    subject.add(high);
    expect(subject.formStep(0)[0]?.request).toBe(high);
  });

  it.each(['prefill', 'decode'] as const)('lets clients take turns, and priority count within each, in %s', (phase) => {
    const limit = phase === 'prefill' ? 16 : 1;
    const subject = scheduler(1, { maxBatchedTokens: limit, prefillChunkTokens: limit });
    const numComputed = phase === 'prefill' ? 0 : 99;
    const of = (client: string, priority: number) =>
      request({ numPromptTokens: 100, numComputed, phase, client: `${phase}-${client}`, priority });
    const [low, high, other] = [of('a', 90), of('a', 100), of('a', 90)];
    const [modest, urgent] = [of('b', 0), of('c', 200)];
    for (const each of [low, high, other, modest, urgent]) subject.add(each);
    const next = () => subject.formStep(0)[0]?.request;
    expect(Array.from({ length: 7 }, next)).toEqual([high, modest, urgent, high, modest, urgent, high]);
    subject.remove(high);
    expect(Array.from({ length: 7 }, next)).toEqual([modest, urgent, low, modest, urgent, other, modest]);
  });
});

/** The chunks that see themselves: all their rows, each key once, nothing of the others. */
function checkSelf(
  self: SelfPart | null,
  entries: readonly { readonly start: number; readonly numTokens: number; readonly isSelf: boolean }[],
): void {
  let row = 0;
  const rows: number[] = [];
  const chunks: number[][] = [];
  for (const { start, numTokens, isSelf } of entries) {
    if (isSelf) chunks.push([start, numTokens]);
    for (let i = 0; i < numTokens; i++, row++) if (isSelf) rows.push(row);
  }
  expect([...(self?.rows ?? [])]).toEqual(rows);
  if (self === null) return;
  const { segments, blocks, kvSlots, numQueryRows, numKvRows } = self.plan;
  expect([numQueryRows, numKvRows, kvSlots.length]).toEqual([rows.length, rows.length, rows.length]);
  expect(new Set(kvSlots).size).toBe(rows.length);
  let numRows = 0;
  for (const [i, [start, numTokens]] of chunks.entries()) {
    const [rowStart, numQueries, firstPosition, blockStart, numBlocks] = segments.subarray(i * SEGMENT_FIELDS);
    expect([rowStart, numQueries, firstPosition]).toEqual([numRows, numTokens, start]);
    let position = start!;
    for (let index = blockStart!; index < blockStart! + numBlocks!; index++) {
      const [block, blockPosition, count] = blocks.subarray(index * BLOCK_FIELDS);
      expect(blockPosition).toBe(position);
      expect(block).toBeLessThan(self.numBlocks);
      for (let offset = 0; offset < count!; offset++, position++)
        expect(kvSlots[numRows + position - start!]).toBe(block! * BLOCK + offset);
    }
    expect(position).toBe(start! + numTokens!);
    numRows += numTokens!;
  }
  expect(segments).toHaveLength(chunks.length * SEGMENT_FIELDS);
}

describe('buildStep', () => {
  it('gives each shard exactly its blocks, queries and new tokens', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.record({
            numTokens: fc.integer({ min: 1, max: 120 }),
            computed: fc.nat(119),
            chunk: fc.integer({ min: 1, max: 40 }),
            numShards: fc.integer({ min: 1, max: 4 }),
            isTrimmed: fc.boolean(),
            numDrafted: fc.nat(3),
          }),
          { minLength: 1, maxLength: 6 },
        ),
        fc.oneof(fc.constant(Number.POSITIVE_INFINITY), fc.integer({ min: 1, max: 70 })),
        (specs, windowTokens) => {
          const entries = specs.map((spec) => {
            const start = Math.min(spec.computed, spec.numTokens - 1);
            const made = request({
              numPromptTokens: spec.numTokens,
              numComputed: start,
              shards: ['a', 'b', 'c', 'd'].slice(0, spec.numShards),
            });
            if (spec.isTrimmed && start >= windowTokens) {
              made.numTrimmedBlocks = Math.floor((start - windowTokens + 1) / BLOCK);
              made.blockTable.splice(0, made.numTrimmedBlocks);
            }
            const numKnown = Math.min(spec.chunk, spec.numTokens - start);
            const isLast = start + numKnown === spec.numTokens;
            const numRoom = (made.numTrimmedBlocks + made.blockTable.length) * BLOCK - start - numKnown;
            const draft = Array.from({ length: isLast ? Math.min(spec.numDrafted, numRoom) : 0 }, (_, i) => 500 + i);
            return { request: made, start, numTokens: numKnown + draft.length, draft, kvGeneration: 0 };
          });
          const { step } = buildStep(entries, { blockSizeTokens: BLOCK, windowTokens, kvDtype: 'f16' }, 1, 42, 1);
          const seenBlocks = new Map<string, number>();
          const storedRows = new Set<number>();
          for (const part of step.shards) {
            const plan = decodeStepPlan(part.plan.subarray(FRAME_HEADER_BYTES));
            expect(plan.numQueryRows).toBe(part.queryRows.length);
            expect(plan.kvSlots).toHaveLength(part.kvRows.length);
            let nextRow = 0;
            for (let at = 0; at < plan.segments.length; at += SEGMENT_FIELDS) {
              const [rowStart, numQueries, firstPosition, blockStart, numBlocks] = plan.segments.subarray(
                at,
                at + SEGMENT_FIELDS,
              );
              expect(rowStart).toBe(nextRow);
              nextRow += numQueries!;
              for (let i = 0; i < numQueries!; i++)
                expect(Number(step.positionIds[part.queryRows[rowStart! + i]!])).toBe(firstPosition! + i);
              for (let index = blockStart!; index < blockStart! + numBlocks!; index++) {
                const [block, position, count] = plan.blocks.subarray(index * BLOCK_FIELDS, (index + 1) * BLOCK_FIELDS);
                expect(seenBlocks.has(`${part.shardId}.${block}`)).toBe(false);
                seenBlocks.set(`${part.shardId}.${block}`, count!);
                expect(position! % BLOCK).toBe(0);
                expect(position! + BLOCK).toBeGreaterThan(firstPosition! - windowTokens + 1);
              }
            }
            expect(nextRow).toBe(plan.numQueryRows);
            part.kvRows.forEach((row, i) => {
              expect(storedRows.has(row)).toBe(false);
              storedRows.add(row);
              const position = Number(step.positionIds[row]);
              expect(plan.kvSlots[i]! % BLOCK).toBe(position % BLOCK);
            });
          }
          expect(storedRows.size).toBe(step.tokenIds.length);
          const oldestOf = (start: number) => Math.floor(Math.max(0, start - windowTokens + 1) / BLOCK) * BLOCK;
          const isSelf = ({ start, numTokens }: (typeof entries)[number]) => start % BLOCK === 0 && numTokens >= 16;
          const numKeys = [...seenBlocks.values()].reduce((sum, count) => sum + count, 0);
          expect(numKeys).toBe(
            entries.reduce(
              (sum, entry) => sum + entry.start + (isSelf(entry) ? 0 : entry.numTokens) - oldestOf(entry.start),
              0,
            ),
          );
          checkSelf(
            step.self,
            entries.map((entry) => ({ ...entry, isSelf: isSelf(entry) })),
          );
          const ended = entries.filter((entry) => entry.start + entry.numTokens >= entry.request.tokens.length);
          const sampled = ended.flatMap(({ request: { tokens }, draft }) =>
            [...draft, undefined].map((drafted, ahead) => ({ position: tokens.length - 1 + ahead, ahead, drafted })),
          );
          expect(step.sampledRows).toHaveLength(sampled.length);
          sampled.forEach(({ position, ahead, drafted }, i) => {
            const row = step.sampledRows[i]!;
            expect(Number(step.positionIds[row])).toBe(position);
            expect([...step.sampling.subarray(i * SAMPLING_FIELDS, (i + 1) * SAMPLING_FIELDS)]).toEqual([
              ...[0.5, 0.9, 4, 0.1, 77, ahead, 3],
              drafted === undefined ? 0 : 1,
            ]);
            if (drafted !== undefined) expect(Number(step.tokenIds[row + 1])).toBe(drafted);
          });
        },
      ),
      { numRuns: 300 },
    );
  });
});

/** One wave or two is what gave more tokens, measured while it serves; requests move accordingly. */
import { describe, expect, it } from 'vitest';
import type { GenerationRequest } from '../src/request/request.ts';
import { Scheduler } from '../src/scheduling/scheduler.ts';
import { WaveChoice } from '../src/scheduling/wave-choice.ts';
import { BLOCK, request } from './requests.ts';

interface Load {
  readonly numRequests: number;
  readonly isPure?: (step: number) => boolean;
  /** Milliseconds of one step of all requests in so many waves, the n-th. */
  readonly stepMs: (numWaves: number, step: number) => number;
}

/** Steps of all requests; returns the number of waves in each. */
function run(subject: WaveChoice, numSteps: number, { numRequests, stepMs, isPure = () => true }: Load): number[] {
  let nowMs = 0;
  const mostUseful = Math.ceil(numRequests / 16);
  return Array.from({ length: numSteps }, (_, step) => {
    const numWaves = subject.numWaves(numRequests, mostUseful);
    for (let wave = 0; wave < numWaves; wave++) {
      nowMs += stepMs(numWaves, step) / numWaves;
      const numTokens = Math.floor(numRequests / numWaves) + (wave < numRequests % numWaves ? 1 : 0);
      subject.stepDone({ nowMs, numTokens, numRequests, mostUseful, isPure: isPure(step) });
    }
    return numWaves;
  });
}

const last = (list: readonly number[]): number => list.at(-1)!;
const shareOf = (list: readonly number[], numWaves: number): number =>
  list.filter((each) => each === numWaves).length / list.length;

describe('WaveChoice', () => {
  it.each([
    { name: 'one wave where overlap gains nothing', one: 40, two: 47, chosen: 1 },
    { name: 'two waves where attention is elsewhere', one: 60, two: 40, chosen: 2 },
  ])('takes $name', ({ one, two, chosen }) => {
    const waves = run(new WaveChoice(2), 1_000, {
      numRequests: 32,
      stepMs: (numWaves) => (numWaves === 1 ? one : two),
    });
    expect(last(waves)).toBe(chosen);
    // The price of knowing: what the first comparison and two later ones try.
    expect(shareOf(waves, chosen)).toBeGreaterThan(0.9);
  });

  it('is not misled by contexts that grow during the comparison', () => {
    const stepMs = (numWaves: number, step: number): number => (40 + step / 10) * (numWaves === 1 ? 1 : 0.95);
    expect(last(run(new WaveChoice(2), 200, { numRequests: 32, stepMs }))).toBe(2);
    const opposite = (numWaves: number, step: number): number => (40 + step / 10) * (numWaves === 1 ? 0.95 : 1);
    expect(last(run(new WaveChoice(2), 200, { numRequests: 32, stepMs: opposite }))).toBe(1);
  });

  it('is not misled by a process that is stopped now and then', () => {
    const stepMs = (numWaves: number, step: number): number => (numWaves === 1 ? (step % 9 === 0 ? 5_000 : 40) : 50);
    expect(last(run(new WaveChoice(2), 200, { numRequests: 32, stepMs }))).toBe(1);
  });

  it('stays with what it has when nothing else is better, and asks less and less often', () => {
    const waves = run(new WaveChoice(2), 6_000, { numRequests: 32, stepMs: () => 40 });
    expect(last(waves)).toBe(2);
    const halves = [waves.slice(0, 3_000), waves.slice(3_000)].map((half) => shareOf(half, 1));
    expect(halves[0]).toBeGreaterThan(0.005);
    expect(halves[1]!).toBeLessThan(halves[0]! / 2);
  });

  it('changes its mind when the shards move', () => {
    const subject = new WaveChoice(2);
    const stepMs = (numWaves: number, step: number): number => ((numWaves === 1) === step < 1_500 ? 40 : 50);
    const waves = run(subject, 6_000, { numRequests: 32, stepMs });
    expect(waves[1_400]).toBe(1);
    expect(last(waves)).toBe(2);
  });

  it('knows a choice for each size, and none before it could compare', () => {
    const subject = new WaveChoice(2);
    run(subject, 500, { numRequests: 32, stepMs: (numWaves) => (numWaves === 1 ? 40 : 50) });
    expect(subject.numWaves(40, 3)).toBe(1);
    expect(subject.numWaves(64, 4)).toBe(2);
    expect(subject.numWaves(16, 1)).toBe(1);
  });

  it('leaves out steps beside prompts, which come again and again', () => {
    const isPure = (step: number): boolean => step % 7 !== 0;
    // Prompts are slower in one wave; what counts is without them.
    const stepMs = (numWaves: number, step: number): number => (numWaves === 1 ? (isPure(step) ? 40 : 500) : 50);
    expect(last(run(new WaveChoice(2), 250, { numRequests: 32, stepMs, isPure }))).toBe(1);
  });

  it('gives a comparison up when the number of requests changes much, and rests', () => {
    const subject = new WaveChoice(2);
    const waves: number[] = [];
    for (let i = 0; i < 100; i++) {
      for (const numRequests of [30, 40]) waves.push(...run(subject, 10, { numRequests, stepMs: () => 40 }));
    }
    expect(shareOf(waves, 1)).toBeLessThan(0.05);
  });

  it('compares neighbours where more than two waves are allowed', () => {
    const subject = new WaveChoice(4);
    const waves = run(subject, 3_000, { numRequests: 64, stepMs: (numWaves) => [0, 60, 50, 55, 70][numWaves]! });
    expect(last(waves)).toBe(2);
  });
});

/** Runs steps as StepLoop does: waves that are idle get one each in turn, and end one after the other. */
class Decoding {
  readonly #subject: Scheduler;
  readonly #inStep: GenerationRequest[][];
  #nowMs = 0;

  constructor(subject: Scheduler) {
    this.#subject = subject;
    this.#inStep = Array.from({ length: subject.numWaves }, () => []);
  }

  /** Returns how many waves were busy in each round. */
  run(numRounds: number, msOf: (numWaves: number) => number): number[] {
    return Array.from({ length: numRounds }, () => {
      this.#pump();
      const busy = this.#inStep.filter((each) => each.length > 0);
      for (const running of busy) {
        const numTokens = running.length;
        this.#nowMs += msOf(busy.length) / busy.length;
        for (const each of running.splice(0)) each.isInStep = false;
        this.#subject.stepGave(numTokens, this.#nowMs);
        this.#pump();
      }
      return busy.length;
    });
  }

  #pump(): void {
    for (const [wave, running] of this.#inStep.entries()) {
      if (running.length > 0) continue;
      for (const { request: each } of this.#subject.formStep(wave)) {
        each.isInStep = true;
        running.push(each);
      }
    }
  }
}

describe('Scheduler', () => {
  const decoding = (): GenerationRequest => request({ numPromptTokens: 10, numComputed: 9, phase: 'decode' });
  const made = (numRequests: number): { subject: Scheduler; requests: GenerationRequest[] } => {
    const subject = new Scheduler({ maxBatchedTokens: 64, prefillChunkTokens: 32, speculation: 'off' }, 2, 1);
    subject.blockSizeTokens = BLOCK;
    const requests = Array.from({ length: numRequests }, decoding);
    for (const each of requests) subject.add(each);
    return { subject, requests };
  };

  it('moves all requests into one wave, and back into two, by what is faster', () => {
    const { subject, requests } = made(32);
    const decodes = new Decoding(subject);
    const counts = decodes.run(250, (numWaves) => (numWaves === 1 ? 40 : 50));
    expect(counts[0]).toBe(2);
    expect(counts.at(-1)).toBe(1);
    expect(decodes.run(4_000, (numWaves) => (numWaves === 1 ? 50 : 40)).at(-1)).toBe(2);
    const sizes = [0, 1].map((wave) => subject.requestsOf(wave).length);
    expect(sizes[0]! + sizes[1]!).toBe(requests.length);
    expect(Math.abs(sizes[0]! - sizes[1]!)).toBeLessThan(2);
  });

  it('compares with two workers as with one', () => {
    const subject = new Scheduler({ maxBatchedTokens: 64, prefillChunkTokens: 32, speculation: 'off' }, 4, 2);
    subject.blockSizeTokens = BLOCK;
    for (let i = 0; i < 64; i++) subject.add(decoding());
    const counts = new Decoding(subject).run(250, (numWaves) => (numWaves === 2 ? 40 : 50));
    expect(counts[0]).toBe(4);
    expect(counts.at(-1)).toBe(2);
    // One comparison with its two parts in fewer waves, then those that were found to be better.
    expect(counts.indexOf(2)).toBeGreaterThan(12);
  });

  it('does not compare while a prompt is computed', () => {
    const { subject } = made(31);
    const prompt = request({ numPromptTokens: 10, numComputed: 0, phase: 'prefill' });
    prompt.isInStep = true;
    subject.add(prompt);
    const counts = new Decoding(subject).run(300, (numWaves) => (numWaves === 1 ? 40 : 50));
    expect(new Set(counts)).toEqual(new Set([2]));
  });
});

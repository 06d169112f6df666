/**
 * Owns continuous batching: which requests belong to which wave, and which of their tokens run in its next step.
 *
 * Invariants
 * 1. A request belongs to one wave at a time and changes it only between steps (the paper's section 4.3 with n = 2:
 *    waves share nothing, so moving one needs no migration of context). A worker's second wave is of use when the first has
 *    MIN_WAVE_REQUESTS: a pass of the dense stages costs nearly as much for 8 rows as for 16, more than overlap gains.
 *    Whether it is used then is measured (wave-choice.ts).
 * 2. A step has at most maxBatchedTokens tokens: one per decoding request first, prefill chunks in what is left. Decoding
 *    requests of all waves wait for a chunk, so beside them it has at most prefillChunkTokens (chunk-limit.ts); while
 *    nobody decodes, or several prompts wait and no more requests decode, it may fill the step. It ends at a block, so
 *    that the next one sees itself (step-builder).
 * 3. When the budget is too small for all, clients take turns (clients.ts) to be first in a step, and its requests go by
 *    priority within each; of equals those that were left out of the last step go first.
 * 4. No token is scheduled that has no room in its request's block table.
 * 5. Drafts only fill a step of decode tokens up to MAX_SPECULATED_ROWS: there a pass costs little more than for one row,
 *    and most of the time of a step is the way to the shards and back. A full batch has none.
 * 6. A request that is to run alone has the next step of its wave for itself, with no longer a chunk than beside others.
 */
import type { ModelDescription } from '@lamina/model';
import type { KvDtype } from '@lamina/tensor';
import type { GenerationRequest } from '../request/request.ts';
import { ChunkLimit } from './chunk-limit.ts';
import { PromptLookup } from './prompt-lookup.ts';
import { WaveChoice } from './wave-choice.ts';

export interface SchedulerLimits {
  readonly maxBatchedTokens: number;
  readonly prefillChunkTokens: number;
  /** Whether drafts are verified beside decode tokens when few requests run. */
  readonly speculation: 'auto' | 'off';
}

const MAX_SPECULATED_ROWS = 16;
/** 8 and 16 requests of SmolLM2-135M's shape: one wave was 4 to 11 % faster than two. */
const MIN_WAVE_REQUESTS = 16;

/** Tokens [start, start + numTokens) of one request in one step; the last draft.length of them are guesses. */
export interface StepEntry {
  readonly request: GenerationRequest;
  readonly start: number;
  readonly numTokens: number;
  readonly draft: readonly number[];
  readonly kvGeneration: number;
}

const NO_DRAFT: readonly number[] = [];

interface DraftLimit {
  /** Most guesses of each request that is decoding. */
  readonly maxTokens: number;
  /** Requests that are decoding beside each. */
  readonly numOthers: number;
}

const NO_DRAFTS: DraftLimit = { maxTokens: 0, numOthers: 0 };

/** Clients by their turns, requests of one by priority; those of one priority stay as they are. */
const byTurn = (a: GenerationRequest, b: GenerationRequest): number =>
  a.client.stepTurn - b.client.stepTurn || b.item.priority - a.item.priority;

/** Whether some requests may come before others. */
function isRanked(wave: readonly GenerationRequest[]): boolean {
  for (const { client, item } of wave) {
    if (client !== wave[0]!.client || item.priority !== wave[0]!.item.priority) return true;
  }
  return false;
}

export class Scheduler {
  readonly #limits: SchedulerLimits;
  readonly #waves: GenerationRequest[][];
  readonly #chunkLimit = new ChunkLimit();
  readonly #waveChoice: WaveChoice;
  /** Every worker's first wave, then every worker's second, ... */
  readonly #waveOrder: readonly number[];
  readonly #numWorkers: number;
  blockSizeTokens = 1;
  kvDtype: KvDtype = 'f32';
  /** Tokens back to which some layer sees, the query's own included; Infinity when some layer sees all. */
  windowTokens = Number.POSITIVE_INFINITY;
  shortSequences: ModelDescription['shortSequences'] = null;

  /** Waves w * numWaves / numWorkers and following are worker w's. */
  constructor(limits: SchedulerLimits, numWaves: number, numWorkers: number) {
    this.#limits = limits;
    this.#waves = Array.from({ length: numWaves }, () => []);
    this.#numWorkers = numWorkers;
    const wavesPerWorker = numWaves / numWorkers;
    this.#waveChoice = new WaveChoice(wavesPerWorker, numWorkers);
    this.#waveOrder = Array.from(
      { length: numWaves },
      (_, i) => (i % numWorkers) * wavesPerWorker + Math.floor(i / numWorkers),
    );
  }

  get numWaves(): number {
    return this.#waves.length;
  }

  /** Most tokens of one request in one step. */
  get maxStepTokens(): number {
    return this.#limits.maxBatchedTokens;
  }

  /** Requests of one wave. */
  requestsOf(waveIndex: number): readonly GenerationRequest[] {
    return this.#waves[waveIndex]!;
  }

  /** Whether prompts may fill the steps: nobody decodes, or several prompts wait and no more requests decode. */
  get #isForPrompts(): boolean {
    let numDecoding = 0;
    let numPrefilling = 0;
    for (const wave of this.#waves) {
      for (const { phase } of wave) {
        if (phase === 'decode') numDecoding++;
        else if (phase === 'prefill') numPrefilling++;
      }
    }
    return numDecoding === 0 || (numPrefilling > 1 && numPrefilling >= numDecoding);
  }

  /** A step of these entries has taken so long. */
  stepTook(entries: readonly StepEntry[], totalMs: number): void {
    let numDecodeTokens = 0;
    let numPromptTokens = 0;
    for (const { request, numTokens, kvGeneration } of entries) {
      // It ended or was preempted meanwhile: what it was in the step is not known any more.
      if (request.kvGeneration !== kvGeneration) return;
      if (request.phase === 'prefill') numPromptTokens += numTokens;
      else numDecodeTokens += numTokens;
    }
    const isDisturbed = this.#waves.some((wave) => wave.some(({ phase }) => phase === 'prefill'));
    this.#chunkLimit.observe({ numDecodeTokens, numPromptTokens, isDisturbed, totalMs });
  }

  /** A step gave so many tokens of answers, and what follows from them is done. */
  stepGave(numTokens: number, nowMs: number): void {
    const numRequests = this.#numRequests;
    const mostUseful = this.#mostUseful(numRequests);
    const isPure = this.#waves.every((wave) => wave.every(({ phase }) => phase === 'decode'));
    this.#waveChoice.stepDone({ nowMs, numTokens, isPure, numRequests, mostUseful });
  }

  get #numRequests(): number {
    let numRequests = 0;
    for (const wave of this.#waves) numRequests += wave.length;
    return numRequests;
  }

  /** Waves of one worker that so many requests of all workers fill. */
  #mostUseful(numRequests: number): number {
    return Math.ceil(numRequests / (this.#numWorkers * MIN_WAVE_REQUESTS));
  }

  /** Waves that are worth a pass of their own for the requests that there are and `numMore`. */
  #usedWaves(numMore: number): readonly number[] {
    const numRequests = this.#numRequests + numMore;
    const numWaves = this.#numWorkers * this.#waveChoice.numWaves(numRequests, this.#mostUseful(numRequests));
    const numFilled = Math.ceil(numRequests / MIN_WAVE_REQUESTS);
    return this.#waveOrder.slice(0, Math.max(this.#numWorkers, Math.min(numWaves, numFilled)));
  }

  /** Puts a request into the used wave with the fewest. */
  add(request: GenerationRequest): void {
    this.remove(request);
    this.#put(request, this.#emptiest(this.#usedWaves(1)));
  }

  remove(request: GenerationRequest): void {
    if (request.waveIndex < 0) return;
    const wave = this.#waves[request.waveIndex]!;
    const at = wave.indexOf(request);
    if (at >= 0) wave.splice(at, 1);
    request.waveIndex = -1;
  }

  /**
   * Evens out the waves: moves requests that are in no step from the fullest wave to `waveIndex`, which is idle, or from it
   * to emptier ones, and all from waves that are no longer worth a pass. Such a wave gives what it has to the emptiest that
   * is: one in a step, since an idle one, which may have been asked before, has taken all.
   */
  #rebalance(waveIndex: number): void {
    const used = this.#usedWaves(0);
    const target = this.#waves[waveIndex]!;
    if (!used.includes(waveIndex)) {
      for (const request of target.splice(0)) this.#put(request, this.#emptiest(used));
      return;
    }
    for (const [index, wave] of this.#waves.entries()) {
      if (wave.length === 0 || used.includes(index)) continue;
      for (const request of wave.filter(({ isInStep }) => !isInStep)) {
        wave.splice(wave.indexOf(request), 1);
        this.#put(request, waveIndex);
      }
    }
    for (;;) {
      let fullest = target;
      for (const wave of this.#waves) if (wave.length > fullest.length) fullest = wave;
      if (fullest.length - target.length < 2) break;
      const at = fullest.findLastIndex((request) => !request.isInStep);
      if (at < 0) break;
      const [request] = fullest.splice(at, 1);
      this.#put(request!, waveIndex);
    }
    for (;;) {
      const emptiest = this.#emptiest(used);
      if (target.length - this.#waves[emptiest]!.length < 2) return;
      this.#put(target.pop()!, emptiest);
    }
  }

  #emptiest(waves: readonly number[]): number {
    return waves.reduce((least, wave) => (this.#waves[wave]!.length < this.#waves[least]!.length ? wave : least));
  }

  #put(request: GenerationRequest, waveIndex: number): void {
    request.waveIndex = waveIndex;
    this.#waves[waveIndex]!.push(request);
  }

  /** The next step of an idle wave; empty when it has nothing to run. */
  formStep(waveIndex: number): StepEntry[] {
    this.#rebalance(waveIndex);
    const wave = this.#waves[waveIndex]!;
    const entries: StepEntry[] = [];
    const { maxBatchedTokens, prefillChunkTokens } = this.#limits;
    for (const request of wave) {
      if (!request.runsAlone) continue;
      const chunkTokens = request.phase === 'decode' ? 1 : Math.min(maxBatchedTokens, prefillChunkTokens);
      if (this.#take(request, this.#toBlockEnd(request, chunkTokens), entries) > 0) return entries;
    }
    let budget = maxBatchedTokens;
    const ranked = isRanked(wave);
    if (ranked) wave.sort(byTurn);
    const drafts = this.#draftLimit(wave);
    for (const request of wave) {
      if (budget > 0 && request.phase === 'decode')
        budget -= this.#take(request, 1, entries, { ...drafts, maxTokens: Math.min(drafts.maxTokens, budget - 1) });
    }
    const numDecoding = entries.length;
    const isForPrompts = this.#isForPrompts;
    if (!isForPrompts) budget = Math.min(budget, this.#chunkLimit.limit(maxBatchedTokens - budget));
    const chunkTokens = isForPrompts ? maxBatchedTokens : prefillChunkTokens;
    for (const request of wave) {
      if (budget > 0 && request.phase === 'prefill')
        budget -= this.#take(request, this.#toBlockEnd(request, Math.min(budget, chunkTokens)), entries);
    }
    if (ranked) {
      entries[0]?.request.client.takeStepTurn();
      entries[numDecoding]?.request.client.takeStepTurn();
    }
    if (entries.length < wave.length) {
      const scheduled = new Set(entries.map((entry) => entry.request));
      wave.sort((a, b) => Number(scheduled.has(a)) - Number(scheduled.has(b)));
    }
    return entries;
  }

  /** Of the next step of a wave. */
  #draftLimit(wave: readonly GenerationRequest[]): DraftLimit {
    if (this.#limits.speculation === 'off') return NO_DRAFTS;
    let numDecoding = 0;
    for (const request of wave) if (request.phase === 'decode') numDecoding++;
    if (numDecoding === 0) return NO_DRAFTS;
    return { maxTokens: Math.floor(MAX_SPECULATED_ROWS / numDecoding) - 1, numOthers: numDecoding - 1 };
  }

  /** Guesses of a request that is decoding: none without room, beyond its end or for another rotary table. */
  #draft(request: GenerationRequest, { maxTokens, numOthers }: DraftLimit, room: number): number[] {
    const { tokens, item, answer } = request;
    if (request.numComputed !== tokens.length - 1) return [];
    const numLeft = item.maxTokens - answer.numTokens - 1;
    const shortTokens = this.shortSequences?.numTokens ?? 0;
    const numShortLeft = tokens.length <= shortTokens ? shortTokens - tokens.length : Number.POSITIVE_INFINITY;
    const numDraftTokens = Math.min(maxTokens, room - 1, numLeft, numShortLeft);
    if (numDraftTokens <= 0) return [];
    request.lookup ??= new PromptLookup(tokens);
    return request.lookup.draft(numDraftTokens, numOthers);
  }

  /** At most `limit` tokens of a prompt that goes on, so many that the next chunk begins at a block; `limit` if that is none. */
  #toBlockEnd({ numComputed, tokens }: GenerationRequest, limit: number): number {
    if (tokens.length - numComputed <= limit) return limit;
    const numPastBlock = (numComputed + limit) % this.blockSizeTokens;
    return numPastBlock < limit ? limit - numPastBlock : limit;
  }

  /** Returns how many tokens it scheduled. */
  #take(request: GenerationRequest, limit: number, entries: StepEntry[], drafts = NO_DRAFTS): number {
    if (!request.isRunnable) return 0;
    const room = request.numTableBlocks * this.blockSizeTokens - request.numComputed;
    const numKnownTokens = Math.min(limit, request.tokens.length - request.numComputed, room);
    if (numKnownTokens <= 0) return 0;
    const draft = drafts.maxTokens > 0 ? this.#draft(request, drafts, room) : NO_DRAFT;
    const numTokens = numKnownTokens + draft.length;
    entries.push({ request, start: request.numComputed, numTokens, draft, kvGeneration: request.kvGeneration });
    return numTokens;
  }
}

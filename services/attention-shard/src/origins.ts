/**
 * Owns who sends steps: the current step of every wave of every origin (a worker thread of an executor), and the origins
 * from which nothing is taken any more because their executor was lost.
 *
 * Invariants
 * 1. Origins and their waves are bounded; the one that has been idle longest makes room.
 * 2. Finding a step costs one map and one array access: a fenced origin has no step, so its layers are refused as any
 *    that have no plan, and only a plan is checked.
 * 3. A layer that is in the kernel counts until it is done, whatever became of its step.
 */
import { LaminaError } from '@lamina/tensor';
import { WaveMemory, type WaveStep } from './wave.ts';

interface Origin {
  readonly steps: (WaveStep | undefined)[];
  plannedAtMs: number;
}

const MAX_ORIGINS = 256;
const MAX_WAVES_PER_ORIGIN = 64;
/** Origin ids never come back, so this is how many executors later a plan may be that was held up on its way. */
const MAX_FENCED = 1024;

export class Origins {
  /** Least recently planned first. */
  readonly #origins = new Map<number, Origin>();
  readonly #endStep: (step: WaveStep) => void;
  /** Oldest first. */
  readonly #fenced = new Set<number>();
  /** Steps that ended while a layer of theirs was in the kernel. */
  readonly #unfinished = new Set<WaveStep>();

  /** @param endStep Called for every step that is dropped or replaced. */
  constructor(endStep: (step: WaveStep) => void) {
    this.#endStep = endStep;
  }

  find(originId: number, waveIndex: number): WaveStep | undefined {
    return this.#origins.get(originId)?.steps[waveIndex];
  }

  /**
   * Makes `make(memory)` the current step of a wave. The former one stays if it throws.
   * @throws LaminaError `unavailable` when the origin is fenced.
   */
  replace(
    originId: number,
    waveIndex: number,
    numLayers: number,
    nowMs: number,
    make: (memory: WaveMemory) => WaveStep,
  ): void {
    if (waveIndex >= MAX_WAVES_PER_ORIGIN)
      throw new LaminaError('protocol_violation', `wave ${waveIndex}; an origin has at most ${MAX_WAVES_PER_ORIGIN}`);
    if (this.#fenced.has(originId))
      throw new LaminaError(
        'unavailable',
        `nothing is taken from origin ${originId} any more: its executor was lost, and its blocks may be others' by now`,
      );
    const former = this.find(originId, waveIndex);
    const step = make(former?.memoryForNext(numLayers) ?? new WaveMemory());
    if (former !== undefined) this.#end(former);
    const origin = this.#origins.get(originId) ?? { steps: [], plannedAtMs: nowMs };
    origin.plannedAtMs = nowMs;
    origin.steps[waveIndex] = step;
    this.#origins.delete(originId);
    if (this.#origins.size >= MAX_ORIGINS) this.#dropOldest();
    this.#origins.set(originId, origin);
  }

  /** The current step of some wave of each origin. */
  *oneOfEach(): IterableIterator<WaveStep> {
    for (const { steps } of this.#origins.values()) {
      const step = steps.find((each) => each !== undefined);
      if (step !== undefined) yield step;
    }
  }

  /** Ends the steps of origins that have sent no plan for `idleMs`. */
  dropIdle(nowMs: number, idleMs: number): void {
    for (const [originId, { plannedAtMs }] of this.#origins) {
      if (nowMs - plannedAtMs < idleMs) return;
      this.#drop(originId);
    }
  }

  /** Takes nothing from these origins any more. Layers of theirs that are in the kernel are not stopped by it. */
  fence(originIds: readonly number[]): void {
    for (const originId of originIds) {
      this.#drop(originId);
      this.#fenced.delete(originId);
      this.#fenced.add(originId);
    }
    for (const oldest of this.#fenced) {
      if (this.#fenced.size <= MAX_FENCED) break;
      this.#fenced.delete(oldest);
    }
  }

  /** Whether a layer of a fenced origin is in the kernel. */
  get isFencedInFlight(): boolean {
    for (const { header } of this.#unfinished) if (this.#fenced.has(header.originId)) return true;
    return false;
  }

  /** Call when the layer in flight of a step that has ended is done. */
  finished(step: WaveStep): void {
    this.#unfinished.delete(step);
  }

  clear(): void {
    for (const originId of [...this.#origins.keys()]) this.#drop(originId);
  }

  #dropOldest(): void {
    for (const originId of this.#origins.keys()) {
      this.#drop(originId);
      return;
    }
  }

  #end(step: WaveStep): void {
    if (step.layerInFlight >= 0) this.#unfinished.add(step);
    this.#endStep(step);
  }

  #drop(originId: number): void {
    for (const step of this.#origins.get(originId)?.steps ?? []) if (step !== undefined) this.#end(step);
    this.#origins.delete(originId);
  }
}

/**
 * Owns who sends steps: the current step of every wave of every origin (a worker thread of an executor).
 *
 * Invariants
 * 1. Origins and their waves are bounded; the one that has been idle longest makes room.
 * 2. Finding a step costs one map and one array access.
 */
import { LaminaError } from '@lamina/tensor';
import { WaveMemory, type WaveStep } from './wave.ts';

interface Origin {
  readonly steps: (WaveStep | undefined)[];
  plannedAtMs: number;
}

const MAX_ORIGINS = 256;
const MAX_WAVES_PER_ORIGIN = 64;

export class Origins {
  /** Least recently planned first. */
  readonly #origins = new Map<number, Origin>();
  readonly #endStep: (step: WaveStep) => void;

  /** @param endStep Called for every step that is dropped or replaced. */
  constructor(endStep: (step: WaveStep) => void) {
    this.#endStep = endStep;
  }

  find(originId: number, waveIndex: number): WaveStep | undefined {
    return this.#origins.get(originId)?.steps[waveIndex];
  }

  /** Makes `step(memory)` the current step of a wave. The former one stays if it throws. */
  replace(
    originId: number,
    waveIndex: number,
    numLayers: number,
    nowMs: number,
    make: (memory: WaveMemory) => WaveStep,
  ): void {
    if (waveIndex >= MAX_WAVES_PER_ORIGIN)
      throw new LaminaError('protocol_violation', `wave ${waveIndex}; an origin has at most ${MAX_WAVES_PER_ORIGIN}`);
    const former = this.find(originId, waveIndex);
    const step = make(former?.memoryForNext(numLayers) ?? new WaveMemory());
    if (former !== undefined) this.#endStep(former);
    const origin = this.#origins.get(originId) ?? { steps: [], plannedAtMs: nowMs };
    origin.plannedAtMs = nowMs;
    origin.steps[waveIndex] = step;
    this.#origins.delete(originId);
    if (this.#origins.size >= MAX_ORIGINS) this.#dropOldest();
    this.#origins.set(originId, origin);
  }

  /** Ends the steps of origins that have sent no plan for `idleMs`. */
  dropIdle(nowMs: number, idleMs: number): void {
    for (const [originId, { plannedAtMs }] of this.#origins) {
      if (nowMs - plannedAtMs < idleMs) return;
      this.#drop(originId);
    }
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

  #drop(originId: number): void {
    for (const step of this.#origins.get(originId)?.steps ?? []) if (step !== undefined) this.#endStep(step);
    this.#origins.delete(originId);
  }
}

/**
 * Owns what is said while a model is pulled: rate and time left, for a terminal or a log.
 *
 * Invariants
 * 1. The rate is that of the last RATE_WINDOW_MS, of bytes that came in this run: what was there before is no speed.
 * 2. Time is given, so that a test can give its own.
 */
import type { PullProgress } from './hub.ts';

const RATE_WINDOW_MS = 10_000;
const SAMPLE_EVERY_MS = 100;
const LOG_EVERY_MS = 10_000;

export interface PullPace {
  readonly bytesPerSecond: number;
  /** null until there is a rate. */
  readonly secondsLeft: number | null;
}

export class PullMeter {
  readonly #nowMs: () => number;
  #samples: { readonly atMs: number; readonly bytes: number }[] = [];

  constructor(nowMs: () => number = () => performance.now()) {
    this.#nowMs = nowMs;
  }

  update({ doneBytes, totalBytes }: Pick<PullProgress, 'doneBytes' | 'totalBytes'>): PullPace {
    const atMs = this.#nowMs();
    // Fewer bytes than before: a damaged file was dropped and begins anew.
    if (doneBytes < (this.#samples.at(-1)?.bytes ?? 0)) this.#samples = [];
    const last = this.#samples.at(-1);
    if (last === undefined || atMs - last.atMs >= SAMPLE_EVERY_MS) this.#samples.push({ atMs, bytes: doneBytes });
    this.#samples = this.#samples.filter((sample) => sample.atMs >= atMs - RATE_WINDOW_MS);
    const first = this.#samples[0] ?? { atMs, bytes: doneBytes };
    const bytesPerSecond = atMs > first.atMs ? ((doneBytes - first.bytes) * 1000) / (atMs - first.atMs) : 0;
    return { bytesPerSecond, secondsLeft: bytesPerSecond > 0 ? (totalBytes - doneBytes) / bytesPerSecond : null };
  }
}

export interface PullLog {
  info(fields: object, message: string): void;
}

/** Listeners for a service: a line in its log at once, and then every ten seconds. */
export function logPull(log: PullLog): { onProgress(progress: PullProgress): void; onWait(): void } {
  const meter = new PullMeter();
  let loggedAtMs = Number.NEGATIVE_INFINITY;
  return {
    onProgress: (progress) => {
      const nowMs = performance.now();
      if (nowMs - loggedAtMs < LOG_EVERY_MS && progress.doneBytes < progress.totalBytes) return;
      loggedAtMs = nowMs;
      log.info({ ...progress, ...meter.update(progress) }, 'pulling the model');
    },
    onWait: () => log.info({}, 'another process pulls the model; waiting for it'),
  };
}

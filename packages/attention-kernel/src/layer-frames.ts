/**
 * Owns the answers that the native kernel gives to frames without JavaScript (native/layer_frames.h): what it needs of a step, and
 * what it counts.
 *
 * Invariants
 * 1. Only frames of an armed step are answered natively; which layer was answered last is in memory that both sides see.
 * 2. What was counted is told once. At most MAX_UNTOLD durations wait; of more than that the oldest are forgotten.
 */

/** What a native link hands the frames of a subscription to first; opaque. */
export interface NativeFrameHandler {
  readonly __nativeFrameHandler: never;
}

/** Fields of the state of an armed step. */
export const STEP_STATE = { layerAnswered: 0, layerInFlight: 1 } as const;
const NUM_STEP_STATES = 2;

/** State of a step of which no layer was answered and none is in flight. */
export function newStepState(): Int32Array {
  return new Int32Array(NUM_STEP_STATES).fill(-1);
}

export interface ArmedAnswer {
  /** Header of the frames of its layers; layer and checksum are of no account. */
  readonly expectedHeader: Uint8Array;
  /** Header, then o and lse; the header is that of an answer but for layer and checksum. Written per layer. */
  readonly answer: Uint8Array;
  /** Subject of the answers. */
  readonly reply: string;
  /** [2] STEP_STATE, read and written per layer. */
  readonly state: Int32Array;
  /** [numLayers] KV tokens that a layer reads. */
  readonly kvTokens: Float64Array;
}

/** Sums since the last time they were told. */
export interface FrameCounts {
  readonly attends: number;
  readonly queryRows: number;
  readonly kvTokens: number;
  readonly durationsSeconds: readonly number[];
}

const COUNT = { attends: 0, queryRows: 1, kvTokens: 2 } as const;
const NUM_COUNTS = 3;
/** Some ten seconds of one request. */
const MAX_UNTOLD = 16_384;

export class FrameTally {
  readonly counts = new Float64Array(NUM_COUNTS);
  readonly durationsSeconds = new Float64Array(MAX_UNTOLD);
  #told = new Float64Array(NUM_COUNTS);

  take(): FrameCounts {
    const now = Float64Array.from(this.counts);
    const since = (field: number): number => now[field]! - this.#told[field]!;
    const attends = since(COUNT.attends);
    const first = Math.max(this.#told[COUNT.attends]!, now[COUNT.attends]! - MAX_UNTOLD);
    const durationsSeconds: number[] = [];
    for (let i = first; i < now[COUNT.attends]!; i++) durationsSeconds.push(this.durationsSeconds[i % MAX_UNTOLD]!);
    const counts = { attends, queryRows: since(COUNT.queryRows), kvTokens: since(COUNT.kvTokens), durationsSeconds };
    this.#told = now;
    return counts;
  }
}

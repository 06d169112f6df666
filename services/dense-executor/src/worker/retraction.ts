/**
 * Owns taking back what a failed step sent, when the connection was cut meanwhile: it may lie in a closed socket, or on its
 * way, and come to a shard when the step's blocks are another request's.
 *
 * Invariants
 * 1. A shard takes plans and layers of the newest step of a wave only. So each shard of the failed step is sent the plan of a
 *    later one, which is empty, and a layer of it: who has answered that refuses whatever comes of the failed one.
 * 2. It is over when every shard has answered or is lost, or the shards refuse the whole origin. Until then the step has not
 *    ended for the executor, so its blocks are given to nobody.
 * 3. Each try that may have been heard takes a step id of its own, of those that the executor keeps free behind the step's.
 * 4. A shard that does not answer is suspected: if it is gone, somebody says so.
 */
import {
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  SUBJECTS,
  writeFrameHeader,
} from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { STEP_ID_STRIDE, type StepRequest } from './messages.ts';

export interface RetractionOptions {
  readonly publish: (subject: string, data: Uint8Array, reply?: string) => void;
  /** Resolves when what was published is on the server, rejects when the connection was cut meanwhile. */
  readonly flush: () => Promise<void>;
  readonly replySubjectOf: (waveIndex: number, shardIndex: number) => string;
  readonly onLate: (shardId: string) => void;
  /** A shard that is silent for so long is asked again. */
  readonly silenceMs: number;
}

/** Nobody listens to the shard's subject: it has died, or connects again. */
const UNHEARD_RETRY_MS = 100;
/** Ids never come back; more are not lost between the begin of a step and its end. */
const MAX_REMEMBERED_LOST = 256;

interface Asked {
  readonly shardId: string;
  readonly shardIndex: number;
  /** Which of the free step ids. */
  numTries: number;
  timer: NodeJS.Timeout | undefined;
}

interface Pending {
  readonly step: Pick<StepRequest, 'waveIndex' | 'stepId'>;
  readonly originId: number;
  /** By shard index: those that have not answered. */
  readonly asked: Map<number, Asked>;
  readonly resolve: () => void;
  readonly reject: (error: LaminaError) => void;
}

const NO_ROWS = {
  numQueryRows: 0,
  numKvRows: 0,
  segments: new Int32Array(0),
  blocks: new Int32Array(0),
  kvSlots: new Int32Array(0),
};

export class Retraction {
  readonly #options: RetractionOptions;
  /** By wave. */
  readonly #pending = new Map<number, Pending>();
  /** Shards that were lost, oldest first. */
  readonly #lost = new Set<string>();

  constructor(options: RetractionOptions) {
    this.#options = options;
  }

  /**
   * Resolves when no shard takes anything of the step any more. Call when the step has failed and before another of its wave.
   * @throws LaminaError `unavailable` when a shard that is not lost has let every try pass without an answer.
   */
  retract(step: Pick<StepRequest, 'waveIndex' | 'stepId' | 'shards'>, originId: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const asked = new Map<number, Asked>();
      for (const [shardIndex, { shardId }] of step.shards.entries())
        if (!this.#lost.has(shardId)) asked.set(shardIndex, { shardId, shardIndex, numTries: 1, timer: undefined });
      if (asked.size === 0) {
        resolve();
        return;
      }
      const pending: Pending = { step, originId, asked, resolve, reject };
      this.#pending.set(step.waveIndex, pending);
      for (const each of asked.values()) this.#ask(pending, each);
    });
  }

  /** Takes a partial output that no step waits for. */
  receive({ originId, waveIndex, shardIndex, stepId }: FrameHeader): void {
    const pending = this.#pending.get(waveIndex);
    const asked = pending?.asked.get(shardIndex);
    if (pending === undefined || asked === undefined || originId !== pending.originId) return;
    const { step } = pending;
    // Any of the tries: also the answer to an earlier one says that the step is over.
    const distance = (stepId - step.stepId) | 0;
    if (distance > 0 && distance < STEP_ID_STRIDE) this.#settle(pending, asked);
  }

  /** The server says that nobody listens. */
  unheard(waveIndex: number, shardIndex: number): void {
    const pending = this.#pending.get(waveIndex);
    const asked = pending?.asked.get(shardIndex);
    if (pending === undefined || asked === undefined) return;
    this.#options.onLate(asked.shardId);
    clearTimeout(asked.timer);
    asked.timer = setTimeout(() => this.#ask(pending, asked), UNHEARD_RETRY_MS).unref();
  }

  /** What the shard held is gone; it comes back under another id. */
  shardLost(shardId: string): void {
    for (const oldest of this.#lost) {
      if (this.#lost.size < MAX_REMEMBERED_LOST) break;
      this.#lost.delete(oldest);
    }
    this.#lost.add(shardId);
    for (const pending of this.#pending.values())
      for (const asked of pending.asked.values()) if (asked.shardId === shardId) this.#settle(pending, asked);
  }

  /** The shards refuse the origin, and the kv-manager has given its blocks to nobody before they did. */
  originEnded(): void {
    for (const pending of this.#pending.values())
      for (const asked of pending.asked.values()) this.#settle(pending, asked);
  }

  #settle(pending: Pending, { shardIndex, timer }: Asked): void {
    clearTimeout(timer);
    pending.asked.delete(shardIndex);
    if (pending.asked.size > 0) return;
    this.#pending.delete(pending.step.waveIndex);
    pending.resolve();
  }

  #ask(pending: Pending, asked: Asked): void {
    const { step, originId } = pending;
    const { waveIndex } = step;
    const { shardId, shardIndex, numTries } = asked;
    const subject = SUBJECTS.shardTensors(shardId);
    const reply = this.#options.replySubjectOf(waveIndex, shardIndex);
    const stepId = (step.stepId + numTries) >>> 0;
    const header = { ...emptyFrameHeader(), originId, waveIndex, shardIndex, stepId };
    const plan = encodeStepPlan(NO_ROWS);
    const layer = new Uint8Array(FRAME_HEADER_BYTES);
    writeFrameHeader(plan, { ...header, kind: FRAME_KIND.plan, bodyBytes: plan.length - FRAME_HEADER_BYTES });
    writeFrameHeader(layer, { ...header, kind: FRAME_KIND.attend });
    this.#options.publish(subject, plan, reply);
    this.#options.publish(subject, layer);
    this.#await(pending, asked);
  }

  #await(pending: Pending, asked: Asked): void {
    clearTimeout(asked.timer);
    asked.timer = setTimeout(() => void this.#onSilence(pending, asked), this.#options.silenceMs).unref();
  }

  async #onSilence(pending: Pending, asked: Asked): Promise<void> {
    const isConnected = await this.#options.flush().then(
      () => true,
      () => false,
    );
    const { waveIndex } = pending.step;
    if (this.#pending.get(waveIndex) !== pending || !pending.asked.has(asked.shardIndex)) return;
    // Without a connection there is nobody to blame.
    if (!isConnected) this.#await(pending, asked);
    else if (asked.numTries < STEP_ID_STRIDE - 1) {
      asked.numTries++;
      this.#options.onLate(asked.shardId);
      this.#ask(pending, asked);
    } else {
      for (const { timer } of pending.asked.values()) clearTimeout(timer);
      this.#pending.delete(waveIndex);
      const what = 'does not confirm that it takes nothing more of a step whose connection was cut';
      pending.reject(new LaminaError('unavailable', `${asked.shardId} ${what}`));
    }
  }
}

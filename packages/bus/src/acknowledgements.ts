/**
 * Owns what this process acknowledged lately in a work queue, to acknowledge it again when a connection comes back.
 *
 * Why so. A nats-server that is killed has not yet written all that it was told: it comes back with messages in the stream that
 * were acknowledged and that it offers to nobody, and counts messages as held that the stream has no more. Neither goes away as
 * long as the queue is never empty. Seen with 2.9.10: one to four such messages a kill, and in one kill of six a count that is
 * too high. And what is acknowledged while the connection is down does not arrive.
 *
 * Invariants
 * 1. What is acknowledged again is the very message that was: a stream that was made anew, or lost its newest messages, may
 *    have another one in its place, and that is left alone.
 * 2. Kept are at most MAX_KEPT, those of the last KEPT_MS; the time in which the connection is down does not count.
 * 3. Nobody waits for it, and what fails is left to the next connection.
 */
import { LaminaError } from '@lamina/tensor';
import { type JsMsg, millis } from 'nats';
import type { Bus } from './bus.ts';
import { messageAt } from './stored-message.ts';
import { streamManager } from './stream-manager.ts';

/** A message of a stream, as its consumer delivered it. */
export interface Delivered {
  /** Position in the stream. */
  readonly sequence: number;
  /** When the server stored it, by its clock, Unix time in ms. */
  readonly storedAtMs: number;
  /** Where the server hears what becomes of it. */
  readonly replySubject: string;
}

export const ACKNOWLEDGE = '+ACK';

/** nats-server writes what it holds in memory at least every two minutes. */
const KEPT_MS = 150_000;
/** As many as a work queue holds. */
const MAX_KEPT = 10_000;

/** @throws LaminaError `internal` when no consumer delivered it. */
export function deliveredOf(message: JsMsg): Delivered {
  if (!('reply' in message) || typeof message.reply !== 'string')
    throw new LaminaError('internal', 'a message of a consumer has no reply subject');
  const storedAtMs = millis(message.info.timestampNanos);
  return { sequence: message.seq, storedAtMs, replySubject: message.reply };
}

export class Acknowledgements {
  readonly #bus: Bus;
  readonly #stream: string;
  /** By sequence, oldest first. */
  readonly #kept = new Map<number, { readonly delivered: Delivered; readonly atMs: number }>();
  #isConnected = true;
  /** Counts connections: what an earlier one has begun ends. */
  #connection = 0;

  /** @param stream With retention by work queue: an acknowledged message is removed. */
  constructor(bus: Bus, stream: string) {
    this.#bus = bus;
    this.#stream = stream;
    bus.onStatus((type) => {
      if (type === 'disconnect') {
        this.#isConnected = false;
        this.#connection++;
      } else if (type === 'reconnect') {
        this.#isConnected = true;
        void this.#acknowledgeAgain().catch(() => undefined);
      }
    });
  }

  /** Remembers a message that was just acknowledged. */
  remember(delivered: Delivered): void {
    const nowMs = performance.now();
    this.#kept.delete(delivered.sequence);
    this.#kept.set(delivered.sequence, { delivered, atMs: nowMs });
    for (const [sequence, { atMs }] of this.#kept) {
      const isOld = this.#isConnected && nowMs - atMs > KEPT_MS;
      if (!isOld && this.#kept.size <= MAX_KEPT) break;
      this.#kept.delete(sequence);
    }
  }

  async #acknowledgeAgain(): Promise<void> {
    const connection = this.#connection;
    const manager = await streamManager(this.#bus);
    const { first_seq, last_seq } = (await manager.streams.info(this.#stream)).state;
    for (const { delivered } of [...this.#kept.values()]) {
      const { sequence, replySubject } = delivered;
      // A message that is still to be stored will have this sequence.
      if (sequence > last_seq) continue;
      const isItself = sequence < first_seq || (await this.#isUnchanged(delivered));
      if (this.#connection !== connection || this.#bus.isClosed) return;
      if (isItself) this.#bus.connection.publish(replySubject, ACKNOWLEDGE);
    }
  }

  /** True where the stream has this message, or none in its place. */
  async #isUnchanged({ sequence, storedAtMs }: Delivered): Promise<boolean> {
    const stored = await messageAt(this.#bus, this.#stream, sequence);
    // The client computes the one time in floating point.
    return stored === undefined || Math.abs(stored.time.getTime() - storedAtMs) <= 1;
  }
}

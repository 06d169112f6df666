/**
 * Owns taking durable prompts from LAMINA_PROMPTS: clients publish them, gateways hand them over to the work queue.
 *
 * Invariants
 * 1. A prompt stays in the stream until `done`; one that is neither renewed nor done is offered to another gateway.
 * 2. Nothing is decoded here: a bad body is answered by whoever takes it.
 */
import type { LaminaError } from '@lamina/tensor';
import { millis } from 'nats';
import type { Bus } from './bus.ts';
import { DurablePull } from './durable-pull.ts';
import { PROMPT_ACK_WAIT_MS, PROMPTS_QUEUE } from './streams.ts';

/** One durable prompt that this process has in hand. */
export interface DurablePrompt {
  /** Position in the stream, as in the publisher's PubAck. */
  readonly sequence: number;
  /** When the server took it, by its clock, Unix time in ms. */
  readonly storedAtMs: number;
  /** At any byte alignment. */
  readonly data: Uint8Array;
  header(name: string): string | undefined;
  /** Its request is in the work queue, or ended: removes the prompt. */
  done(): void;
  /** Hands it back, to be offered again after `delayMs`. */
  putBack(delayMs: number): void;
}

export class PromptQueue {
  readonly #bus: Bus;
  readonly #pull: DurablePull;

  /**
   * Call `ensureStreams` first.
   * @param onRepair Told why the queue's consumer was made anew.
   */
  constructor(bus: Bus, onRepair: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#pull = new DurablePull(bus, PROMPTS_QUEUE, onRepair);
  }

  /** Waits up to `waitMs` for the next prompt and keeps it until it is done or put back. Rejects when JetStream is away. */
  async take(waitMs: number): Promise<DurablePrompt | undefined> {
    const message = await this.#pull.next(waitMs);
    if (message === undefined) return undefined;
    const renewal = setInterval(() => {
      if (this.#bus.isClosed) clearInterval(renewal);
      else message.working();
    }, PROMPT_ACK_WAIT_MS / 3);
    return {
      sequence: message.seq,
      storedAtMs: millis(message.info.timestampNanos),
      data: message.data,
      header: (name) => message.headers?.get(name) || undefined,
      done: () => {
        clearInterval(renewal);
        if (!this.#bus.isClosed) message.ack();
      },
      putBack: (delayMs) => {
        clearInterval(renewal);
        if (!this.#bus.isClosed) message.nak(delayMs);
      },
    };
  }
}

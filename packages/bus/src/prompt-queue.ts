/**
 * Owns taking durable prompts from LAMINA_PROMPTS: clients publish them, gateways hand them over to the work queue.
 *
 * Invariants
 * 1. A prompt stays in the stream until `done`; one that is neither renewed nor done is offered to another gateway.
 * 2. Nothing is decoded here: a bad body is answered by whoever takes it.
 */
import { STREAMS } from '@lamina/protocol';
import { type Consumer, type JetStreamClient, millis } from 'nats';
import type { Bus } from './bus.ts';
import { PROMPT_ACK_WAIT_MS } from './streams.ts';

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
  readonly #jetstream: JetStreamClient;
  #consumer: Consumer | undefined;

  /** Call `ensureStreams` first. */
  constructor(bus: Bus) {
    this.#bus = bus;
    this.#jetstream = bus.connection.jetstream();
  }

  /** Waits up to `waitMs` for the next prompt and keeps it until it is done or put back. Rejects when JetStream is away. */
  async take(waitMs: number): Promise<DurablePrompt | undefined> {
    this.#consumer ??= await this.#jetstream.consumers.get(STREAMS.prompts.name, STREAMS.prompts.durableConsumer);
    const message = await this.#consumer.next({ expires: waitMs });
    if (message === null) return undefined;
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

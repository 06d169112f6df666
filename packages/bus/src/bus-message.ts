/** Owns what a handler sees of a received message, and what becomes of a handler that throws. */
import { asLaminaError, type LaminaError } from '@lamina/tensor';
import type { Msg } from 'nats';

/**
 * One received message. `data` is a view at any byte alignment. nats.js never writes to a received chunk again (Node
 * reads each into new memory, a message split over chunks is copied out), so the view stays unchanged while it is held;
 * it keeps its whole chunk alive.
 */
export interface BusMessage {
  readonly subject: string;
  readonly data: Uint8Array;
  /** Subject to answer to, or undefined. */
  readonly reply: string | undefined;
  header(name: string): string | undefined;
}

export interface BusEvents {
  /** A handler failed or a message was malformed: for the log and the error counter. */
  readonly onError: (error: LaminaError, subject: string) => void;
}

/** Fields are decoded when they are read. */
export class LazyMessage implements BusMessage {
  readonly #message: Msg;

  constructor(message: Msg) {
    this.#message = message;
  }

  get subject(): string {
    return this.#message.subject;
  }

  get data(): Uint8Array {
    return this.#message.data;
  }

  get reply(): string | undefined {
    return this.#message.reply || undefined;
  }

  header(name: string): string | undefined {
    return this.#message.headers?.get(name) || undefined;
  }
}

/** A handler that throws is reported, and ends nothing. */
export function guarded(events: BusEvents, subject: string, run: () => void): void {
  try {
    run();
  } catch (cause) {
    events.onError(asLaminaError(cause), subject);
  }
}

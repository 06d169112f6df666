/**
 * Owns taking durable prompts from LAMINA_PROMPTS: clients publish them, gateways hand them over to the work queue.
 *
 * Invariants
 * 1. A prompt stays in the stream until `done`; one that is neither renewed, kept nor done is offered to another gateway.
 * 2. Nothing is decoded here: a bad body is answered by whoever takes it.
 * 3. What was done is removed, also where the server lost that when it was killed (acknowledgements.ts).
 * 4. A prompt that was set aside is a position and a subject: its body and headers are in the stream only, until `open`.
 */
import type { LaminaError } from '@lamina/tensor';
import { type MsgHdrs, nanos } from 'nats';
import { ACKNOWLEDGE, Acknowledgements, type Delivered, deliveredOf } from './acknowledgements.ts';
import type { Bus } from './bus.ts';
import { DurablePull } from './durable-pull.ts';
import { messageAt } from './stored-message.ts';
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
  /** Gives its body up; it is this process's for `keepMs`. */
  setAside(keepMs: number): PromptAside;
}

/** A durable prompt that this process will open later. */
export interface PromptAside {
  readonly sequence: number;
  /** Nobody else is offered it for so long, from now on. */
  keep(keepMs: number): void;
  /** Takes it in hand again; undefined when the stream has it no more. Rejects when JetStream is away: it is still aside. */
  open(): Promise<DurablePrompt | undefined>;
  /** Hands it back, to be offered again at once. */
  putBack(): void;
}

/** What the server stored, whichever way it came. */
interface Stored {
  readonly delivered: Delivered;
  readonly data: Uint8Array;
  readonly headers: MsgHdrs | undefined;
}

const PUT_BACK = '-NAK';
const WORKING = '+WPI';
const putBackAfter = (delayMs: number): string =>
  delayMs > 0 ? `${PUT_BACK} ${JSON.stringify({ delay: nanos(delayMs) })}` : PUT_BACK;

export class PromptQueue {
  readonly #bus: Bus;
  readonly #pull: DurablePull;
  readonly #acknowledgements: Acknowledgements;

  /**
   * Call `ensureStreams` first.
   * @param onRepair Told why the queue's consumer was made anew.
   */
  constructor(bus: Bus, onRepair: (error: LaminaError) => void) {
    this.#bus = bus;
    this.#pull = new DurablePull(bus, PROMPTS_QUEUE, onRepair);
    this.#acknowledgements = new Acknowledgements(bus, PROMPTS_QUEUE.stream);
  }

  /** Waits up to `waitMs` for the next prompt and keeps it until it is done or put back. Rejects when JetStream is away. */
  async take(waitMs: number): Promise<DurablePrompt | undefined> {
    const message = await this.#pull.next(waitMs);
    if (message === undefined) return undefined;
    const { data, headers } = message;
    return this.#inHand({ delivered: deliveredOf(message), data, headers });
  }

  #inHand({ delivered, data, headers }: Stored): DurablePrompt {
    const { sequence, storedAtMs, replySubject } = delivered;
    const renewal = setInterval(() => {
      if (this.#bus.isClosed) clearInterval(renewal);
      else this.#say(replySubject, WORKING);
    }, PROMPT_ACK_WAIT_MS / 3);
    const end = (answer: string): void => {
      clearInterval(renewal);
      this.#say(replySubject, answer);
    };
    return {
      sequence,
      storedAtMs,
      data,
      header: (name) => headers?.get(name) || undefined,
      done: () => {
        end(ACKNOWLEDGE);
        this.#acknowledgements.remember(delivered);
      },
      putBack: (delayMs) => end(putBackAfter(delayMs)),
      setAside: (keepMs) => {
        // What the server puts back after a delay counts as taken until then, and can be renewed and done meanwhile.
        end(putBackAfter(keepMs));
        return this.#aside(delivered);
      },
    };
  }

  #aside(delivered: Delivered): PromptAside {
    const { sequence, replySubject } = delivered;
    return {
      sequence,
      keep: (keepMs) => this.#say(replySubject, putBackAfter(keepMs)),
      putBack: () => this.#say(replySubject, PUT_BACK),
      open: async () => {
        const stored = await messageAt(this.#bus, PROMPTS_QUEUE.stream, sequence);
        if (stored === undefined) return undefined;
        this.#say(replySubject, WORKING);
        const { data, header: headers, time } = stored;
        return this.#inHand({ delivered: { ...delivered, storedAtMs: time.getTime() }, data, headers });
      },
    };
  }

  #say(replySubject: string, answer: string): void {
    if (!this.#bus.isClosed) this.#bus.connection.publish(replySubject, answer);
  }
}

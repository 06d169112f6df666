/**
 * Owns where a relay has the messages of an answer from: they are heard as they are stored, and after a gap or a reconnection read
 * from the stream.
 *
 * Invariants
 * 1. The stream is read from the answer's start, and only where it has more than was relayed, or maybe other tokens. Messages
 *    are heard before that begins, and those that come meanwhile wait for its end: what is not read is heard. Both may bring
 *    the same.
 * 2. A message from just before it was listened for may be stored just after the stream was looked at: so that is done twice.
 * 3. At most MAX_HELD messages wait; if there were more, the stream is read again.
 * 4. A read that a broken connection leaves without an answer is abandoned: nobody waits for its time-out.
 * 5. Once stopped, it holds no subscription, no consumer and no timer.
 */
import type { BusMessage, StoredEnd, Subscription } from '@lamina/bus';
import type { FewAtATime } from './few-at-a-time.ts';

export interface AnswerLinks {
  readonly tokens: {
    follow(
      requestId: string,
      callback: (message: Pick<BusMessage, 'data'>) => void,
      onDoubt?: () => void,
    ): Subscription;
    endOf(requestId: string): Promise<Pick<StoredEnd, 'sequence' | 'isComplete' | 'nextIndex'> | undefined>;
    read(requestId: string, lastSequence: number, take: (data: Uint8Array, sequence: number) => boolean): Promise<void>;
  };
  /** Shared by all that read: after a reconnection that is every open answer. */
  readonly readers: Pick<FewAtATime, 'run'>;
}

/** `heard`: the stream may have refused it. `first`: the first that the stream has of the answer, `stored`: one behind it. */
export type Origin = 'heard' | 'first' | 'stored';

export interface AnswerReceiver {
  /** `data` is valid only during the call. Must not throw. */
  receive(data: Uint8Array, origin: Origin): void;
  /** Index of the token that it wants next. */
  readonly nextIndex: number;
}

const READ_AGAIN_MS = 500;
const MAX_HELD = 1_024;

export class AnswerSource {
  readonly #requestId: string;
  readonly #links: AnswerLinks;
  readonly #receiver: AnswerReceiver;
  readonly #held: Uint8Array[] = [];
  #subscription: Subscription | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** Messages wait. */
  #isHolding = true;
  #isReading = false;
  /** Something may have been missed since the stream was looked at. */
  #isBehind = false;
  /** What was relayed may not be what is stored. */
  #isDoubtful = false;
  #isStopped = false;
  /** Counts reads: of those that were abandoned nothing is taken. */
  #round = 0;
  #abandon: () => void = () => undefined;
  #lastSequence = 0;

  constructor(requestId: string, links: AnswerLinks, receiver: AnswerReceiver) {
    this.#requestId = requestId;
    this.#links = links;
    this.#receiver = receiver;
  }

  /** Stream sequence of the last message that was found in the stream; 0 before any. */
  get lastSequence(): number {
    return this.#lastSequence;
  }

  /** Listens; what comes waits until `open` or `catchUp`. */
  listen(): void {
    if (this.#isStopped) return;
    this.#subscription ??= this.#links.tokens.follow(
      this.#requestId,
      ({ data }) => this.#hear(data),
      () => void this.doubt(),
    );
  }

  /** Hands on what waited, and what comes from now on. */
  async open(): Promise<void> {
    if (this.#isBehind) return this.catchUp();
    this.#isHolding = this.#isReading;
    if (this.#isHolding) return;
    // One of them may show a gap: then the others wait again.
    for (const data of this.#held.splice(0)) this.#hear(data);
  }

  /** Something may have been missed, which is seen to when it is open. */
  fallBehind(): void {
    this.#isBehind = true;
  }

  /** Reads what is stored and was not relayed; then, or while it is read already, what comes. Never rejects. */
  async catchUp(): Promise<void> {
    this.#isBehind = true;
    if (this.#isReading || this.#isStopped) return;
    this.listen();
    await this.#read(false);
  }

  /** Two have written: reads what is stored, also where it is no more than was relayed. Never rejects. */
  async doubt(): Promise<void> {
    this.#isDoubtful = true;
    if (this.#isHolding) this.fallBehind();
    else await this.catchUp();
  }

  /** The connection is a new one: reads what is missing, whatever is being read. Never rejects. */
  async startOver(): Promise<void> {
    if (this.#isStopped) return;
    this.#abandon();
    this.listen();
    await this.#read(false);
  }

  stop(): void {
    this.#isStopped = true;
    this.#abandon();
    this.#subscription?.unsubscribe();
    this.#subscription = undefined;
    this.#held.length = 0;
    clearTimeout(this.#timer);
  }

  #hear(data: Uint8Array): void {
    if (this.#isStopped) return;
    if (!this.#isHolding) this.#receiver.receive(data, 'heard');
    else if (this.#held.length < MAX_HELD) this.#held.push(new Uint8Array(data));
    else this.#isBehind = true;
  }

  async #read(isSecondTime: boolean): Promise<void> {
    clearTimeout(this.#timer);
    this.#isReading = true;
    // The second time most likely nothing was missed: what comes need not wait for that.
    this.#isHolding = !isSecondTime;
    this.#isBehind = false;
    const round = ++this.#round;
    const abandoned = new Promise<boolean>((resolve) => {
      this.#abandon = () => resolve(false);
    });
    // A stream that cannot be read now is read later.
    const isWhole = await this.#links.readers
      .run(() => Promise.race([this.#readStored(round), abandoned]))
      .catch(() => false);
    if (this.#isOver(round)) return;
    if (!isWhole) return this.#later(() => this.#read(false));
    this.#isReading = false;
    if (isSecondTime && !this.#isBehind) this.#isDoubtful = false;
    await this.open();
    if (!isSecondTime && !this.#isReading) this.#later(() => this.#read(true));
  }

  #isOver(round: number): boolean {
    return this.#isStopped || round !== this.#round;
  }

  /** Whether nothing is missing before the end of what is stored. */
  async #readStored(round: number): Promise<boolean> {
    if (this.#isOver(round)) return true;
    const end = await this.#links.tokens.endOf(this.#requestId);
    if (this.#isOver(round) || end === undefined) return true;
    const { isComplete, nextIndex = 0 } = end;
    const isWhole = (): boolean => !isComplete && nextIndex <= this.#receiver.nextIndex;
    if (isWhole() && !this.#isDoubtful) {
      this.#lastSequence = end.sequence;
      return true;
    }
    this.#isHolding = true;
    let origin: Origin = 'first';
    await this.#links.tokens.read(this.#requestId, end.sequence, (data, sequence) => {
      if (this.#isOver(round)) return false;
      this.#lastSequence = sequence;
      this.#receiver.receive(data, origin);
      origin = 'stored';
      return true;
    });
    return this.#isOver(round) || isWhole();
  }

  #later(run: () => Promise<void>): void {
    if (this.#isStopped) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void run(), READ_AGAIN_MS);
  }
}

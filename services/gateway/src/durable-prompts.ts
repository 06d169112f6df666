/**
 * Owns handing durable prompts over: from LAMINA_PROMPTS to the work queue, or to an error that is stored as the answer.
 *
 * Invariants
 * 1. A prompt is acknowledged only when its request is in the work queue or its answer is stored whole. A gateway that dies
 *    before that leaves it to another, which finds what was reached by the id: each request is submitted once.
 * 2. A prompt is never refused because the cluster is full or down: it waits, here or in the stream.
 * 3. An error never replaces an answer: it is stored only where nothing is stored under its id.
 * 4. Generated ids begin again with a new LAMINA_PROMPTS: one whose answer is still stored from before waits until it is not.
 * 5. A body is read once while its prompt is in hand. While nobody can answer, or there is too little KV for it, neither body
 *    nor streams are read, unless to end it.
 * 6. At most MAX_IN_HAND prompts are in hand, with their bodies; the others wait in an order that is fair between clients
 *    (waiting-prompts.ts), their bodies in the stream.
 */
import type { DurablePrompt, PromptQueue, TokenStream } from '@lamina/bus';
import { PastCancels, SUBJECTS, type TokenMessage, type WireEncoding, type WorkItem } from '@lamina/protocol';
import type { Complain, Counter, Logger } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { cancelledEnd, deadlineExceeded, failedEnd } from './answer-end.ts';
import { CLIENT_HEADER, clientIdOf, DEFAULT_CLIENT } from './client-id.ts';
import { type ClusterView, requireAvailable } from './cluster-view.ts';
import { LargePrompts } from './large-prompts.ts';
import { type PreparationParts, prepare } from './preparation.ts';
import { type PromptTerms, type ReadPrompt, readPrompt } from './read-prompt.ts';
import type { RequestState } from './request-state.ts';
import { type WaitingPrompt, WaitingPrompts } from './waiting-prompts.ts';

export interface DurablePromptsParts extends PreparationParts {
  readonly prompts: Pick<PromptQueue, 'take'>;
  readonly tokens: Pick<TokenStream, 'append' | 'endOf'>;
  /** Puts an item into the work queue, when there is a place for it. */
  readonly submit: (item: WorkItem, client: string) => Promise<unknown>;
  readonly locate: (requestId: string) => Promise<RequestState>;
  readonly cluster: Pick<ClusterView, 'recent'>;
  /** Label `outcome`: submitted, known, cancelled, or an error code. */
  readonly counter: () => Counter<'outcome'>;
  readonly log: Pick<Logger, 'debug' | 'error'>;
  /** For what prompts cause, which come in any number. */
  readonly complain: Complain;
}

const MAX_IN_HAND = 32;
/** After a pull in vain it is looked whether the server keeps something back. */
const TAKE_WAIT_MS = 10_000;
/** While the cluster is down or full. */
const RETRY_MS = 500;
/** For prompts that need more KV than there is now; the others must not wait for a shard with them. */
const CAPACITY_RETRY_MS = 5_000;
/** For prompts whose generated id has the answer of a former stream. */
const FORMER_ANSWER_RETRY_MS = 5_000;

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export class DurablePrompts {
  readonly #parts: DurablePromptsParts;
  readonly #inHand = new Set<DurablePrompt>();
  readonly #cancels = new PastCancels();
  readonly #waiting = new WaitingPrompts();
  readonly #large = new LargePrompts();
  /** Those that waited and whose bodies are being read. */
  #numOpening = 0;
  #isStopping = false;

  constructor(parts: DurablePromptsParts) {
    this.#parts = parts;
  }

  /** Takes prompts until `stop`. */
  async run(): Promise<void> {
    const { prompts, log } = this.#parts;
    while (!this.#isStopping) {
      try {
        const prompt = await prompts.take(TAKE_WAIT_MS);
        if (prompt === undefined) continue;
        if (this.#isStopping) prompt.putBack(0);
        else if (this.#hasPlace && this.#waiting.size === 0) void this.#handOver(prompt);
        else {
          this.#waiting.add(prompt, clientOf(prompt));
          this.#fillPlaces();
        }
      } catch (cause) {
        if (this.#isStopping) return;
        log.error({ err: asLaminaError(cause) }, 'no durable prompts can be taken; trying again');
        await sleep(RETRY_MS);
      }
    }
  }

  /** Hands everything back that is not handed over. */
  stop(): void {
    this.#isStopping = true;
    for (const prompt of this.#inHand) prompt.putBack(0);
    this.#inHand.clear();
    this.#waiting.putBack();
  }

  get #hasPlace(): boolean {
    return this.#inHand.size + this.#numOpening < MAX_IN_HAND;
  }

  #fillPlaces(): void {
    while (this.#hasPlace) {
      const next = this.#waiting.next();
      if (next === undefined) return;
      void this.#open(next);
    }
  }

  async #open(waiting: WaitingPrompt): Promise<void> {
    const { aside } = waiting;
    this.#numOpening++;
    try {
      const prompt = await aside.open();
      if (this.#isStopping) prompt?.putBack(0);
      // One that is gone was handed over by another gateway, or has aged out.
      else if (prompt !== undefined) void this.#handOver(prompt);
    } catch (cause) {
      this.#parts.log.debug({ err: asLaminaError(cause), sequence: aside.sequence }, 'a durable prompt cannot be read');
      await sleep(RETRY_MS);
      if (this.#isStopping) aside.putBack();
      else this.#waiting.addAgain(waiting);
    } finally {
      this.#numOpening--;
      this.#fillPlaces();
    }
  }

  /** Ends the prompt of this id that is here or in the stream; not one that is published later. */
  cancel(requestId: string): void {
    this.#cancels.add(requestId);
  }

  async #handOver(prompt: DurablePrompt): Promise<void> {
    const { log, counter } = this.#parts;
    this.#inHand.add(prompt);
    // A cancel that comes from here on is for this prompt, whatever the clock of the server says.
    const submittedAtMs = Math.min(prompt.storedAtMs, Date.now());
    const mustEnd = ({ id, deadlineAtMs }: PromptTerms): boolean =>
      deadlineAtMs <= Date.now() || this.#cancels.hasCancelled(id, submittedAtMs);
    let read: ReadPrompt | undefined;
    while (this.#inHand.has(prompt)) {
      let delayMs: number | undefined;
      try {
        const known = this.#large.of(prompt);
        if (known !== undefined && !mustEnd(known)) await this.#requireRoom(known.neededTokens);
        read ??= readPrompt(prompt);
        if ('request' in read.asked && !mustEnd(read)) await this.#requireRoom(0);
        const outcome = await this.#attempt(prompt, read, submittedAtMs);
        this.#large.delete(prompt);
        counter().inc({ outcome });
        if (this.#inHand.delete(prompt)) prompt.done();
      } catch (cause) {
        const error = asLaminaError(cause);
        if (error.code === 'kv_capacity_exceeded') delayMs = CAPACITY_RETRY_MS;
        if (error.code === 'unavailable') delayMs = error.retryAfterMs;
        log.debug({ err: error, sequence: prompt.sequence }, 'a durable prompt waits');
      }
      if (delayMs !== undefined && this.#inHand.delete(prompt)) prompt.putBack(delayMs);
      if (this.#inHand.has(prompt)) await sleep(RETRY_MS);
    }
    this.#fillPlaces();
  }

  /**
   * Returns how the prompt ended here.
   * @throws LaminaError when it is to be tried again.
   */
  async #attempt(prompt: DurablePrompt, read: ReadPrompt, submittedAtMs: number): Promise<string> {
    const { submit, locate } = this.#parts;
    const { id, encoding, asked } = read;
    let neededTokens = 0;
    try {
      if (!('request' in asked)) throw asked;
      const { request, client } = asked;
      if (read.isIdGenerated) await this.#requireOwnAnswer(id, prompt);
      const state = await locate(id);
      if (state === 'working' || state === 'ended') return 'known';
      if (this.#cancels.hasCancelled(id, submittedAtMs)) {
        const extent = { promptTokens: 0, completionTokens: 0 };
        return (await this.#isStoredFirst(cancelledEnd(id, extent), encoding)) ? 'cancelled' : 'known';
      }
      if (read.deadlineAtMs <= Date.now()) throw deadlineExceeded();
      const item = await prepare(this.#parts, request, {
        id,
        encoding,
        client,
        receivedAtMs: prompt.storedAtMs,
        isContinued: state === 'cut',
        onCounted: (promptTokens) => {
          neededTokens = promptTokens + (request.max_tokens ?? 1);
        },
      });
      await submit(item, client);
      return 'submitted';
    } catch (cause) {
      const error = asLaminaError(cause);
      if (error.code === 'duplicate_id') {
        const state = await locate(id);
        if (state === 'working' || state === 'ended') return 'known';
        throw error;
      }
      if (error.code === 'kv_capacity_exceeded') this.#large.add(prompt, read, neededTokens);
      if (error.retryable || error.code === 'kv_capacity_exceeded') throw error;
      if (error.code === 'internal') this.#parts.complain(error, SUBJECTS.tokens(id));
      if ((await locate(id)) !== 'unknown') return 'known';
      return (await this.#isStoredFirst(failedEnd(id, 0, error), encoding)) ? error.code : 'known';
    }
  }

  /** @throws LaminaError `unavailable`, `kv_capacity_exceeded` */
  async #requireRoom(neededTokens: number): Promise<void> {
    const { kvCapacityTokens } = requireAvailable(await this.#parts.cluster.recent());
    if (neededTokens <= kvCapacityTokens) return;
    const problem = `a durable prompt needs KV for ${neededTokens} tokens; all attention shards together hold`;
    throw new LaminaError('kv_capacity_exceeded', `${problem} ${kvCapacityTokens}`);
  }

  /**
   * Stores an end as the whole answer; false when the answer has something already.
   * @throws LaminaError `unavailable`
   */
  async #isStoredFirst(end: TokenMessage, encoding: WireEncoding): Promise<boolean> {
    let sequence: number | undefined;
    try {
      sequence = await this.#parts.tokens.append([end], encoding, 0);
    } catch (cause) {
      if (asLaminaError(cause).code === 'duplicate_id') return false;
      throw cause;
    }
    if (sequence === undefined) throw new LaminaError('unavailable', 'the end of an answer could not be stored');
    return true;
  }

  /** @throws LaminaError `unavailable` while an answer from before the prompt has its generated id. */
  async #requireOwnAnswer(id: string, prompt: DurablePrompt): Promise<void> {
    const stored = await this.#parts.tokens.endOf(id);
    if (stored?.isComplete !== true || stored.storedAtMs >= prompt.storedAtMs) return;
    const problem = `a durable prompt waits until the answer "${id}" of a former LAMINA_PROMPTS has aged out`;
    const advice = 'delete LAMINA_TOKENS whenever you delete LAMINA_PROMPTS';
    const error = new LaminaError('unavailable', `${problem}; ${advice}`, { retryAfterMs: FORMER_ANSWER_RETRY_MS });
    this.#parts.complain(error, SUBJECTS.tokens(id));
    throw error;
  }
}

/** Whose turn it is to be handed over; one that names no client well is refused then. */
function clientOf(prompt: DurablePrompt): string {
  try {
    // A copy: parts of a string keep all of it, which is as large as the headers of the message.
    return Buffer.from(clientIdOf(prompt.header(CLIENT_HEADER))).toString();
  } catch {
    return DEFAULT_CLIENT;
  }
}

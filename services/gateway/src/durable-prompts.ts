/**
 * Owns handing durable prompts over: from LAMINA_PROMPTS to the work queue, or to an error that is stored as the answer.
 *
 * Invariants
 * 1. A prompt is acknowledged only when its request is in the work queue or its answer is stored whole. A gateway that dies
 *    before that leaves it to another, which finds what was reached by the id: each request is submitted once.
 * 2. A prompt is never refused because the cluster is full or down: it waits, here or in the stream.
 * 3. An error never replaces an answer: it is stored only where nothing is stored under its id.
 * 4. Generated ids begin again with a new LAMINA_PROMPTS: one whose answer is still stored from before waits until it is not.
 * 5. At most MAX_IN_HAND prompts are in hand, with their bodies; the others wait in an order that is fair between clients
 *    (waiting-prompts.ts), their bodies in the stream.
 */
import type { DurablePrompt, PromptQueue, TokenStream } from '@lamina/bus';
import {
  encodingOf,
  idSchema,
  type ParsedGenerateBody,
  PastCancels,
  parseGenerateBody,
  requestIdOf,
  type TokenMessage,
  type WireEncoding,
  type WorkItem,
} from '@lamina/protocol';
import type { Counter, Logger } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { cancelledEnd, deadlineExceeded, failedEnd } from './answer-end.ts';
import { CLIENT_HEADER, clientIdOf, DEFAULT_CLIENT } from './client-id.ts';
import { type ClusterView, requireAvailable } from './cluster-view.ts';
import { type PreparationParts, prepare } from './preparation.ts';
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
  readonly log: Pick<Logger, 'debug' | 'warn' | 'error'>;
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
const MESSAGE_ID_HEADER = 'Nats-Msg-Id';

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export class DurablePrompts {
  readonly #parts: DurablePromptsParts;
  readonly #inHand = new Set<DurablePrompt>();
  readonly #cancels = new PastCancels();
  readonly #waiting = new WaitingPrompts();
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

  async #open({ aside, client }: WaitingPrompt): Promise<void> {
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
      else this.#waiting.addAgain(aside, client);
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
    while (this.#inHand.has(prompt)) {
      let delayMs: number | undefined;
      try {
        const outcome = await this.#attempt(prompt, submittedAtMs);
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
  async #attempt(prompt: DurablePrompt, submittedAtMs: number): Promise<string> {
    const { submit, cluster, locate } = this.#parts;
    const headerId = idSchema.safeParse(prompt.header(MESSAGE_ID_HEADER)).data;
    let id = requestIdOf(prompt.data) ?? headerId ?? generatedId(prompt);
    let encoding = encodingOf(prompt.data);
    try {
      const parsed = parseGenerateBody(prompt.data);
      encoding = parsed.encoding;
      id = idOf(parsed, prompt);
      const client = clientIdOf(prompt.header(CLIENT_HEADER));
      if (id === generatedId(prompt)) await this.#requireOwnAnswer(id, prompt);
      const state = await locate(id);
      if (state === 'working' || state === 'ended') return 'known';
      if (this.#cancels.hasCancelled(id, submittedAtMs)) {
        const extent = { promptTokens: 0, completionTokens: 0 };
        return (await this.#isStoredFirst(cancelledEnd(id, extent), encoding)) ? 'cancelled' : 'known';
      }
      const { request } = parsed;
      const deadlineAtMs = request.deadline_ms === undefined ? Infinity : prompt.storedAtMs + request.deadline_ms;
      if (deadlineAtMs <= Date.now()) throw deadlineExceeded();
      requireAvailable(await cluster.recent());
      const isContinued = state === 'cut';
      const item = await prepare(this.#parts, request, {
        id,
        encoding,
        client,
        receivedAtMs: prompt.storedAtMs,
        isContinued,
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
      if (error.retryable || error.code === 'kv_capacity_exceeded') throw error;
      if (error.code === 'internal') this.#parts.log.error({ err: error, requestId: id }, 'a durable prompt failed');
      if ((await locate(id)) !== 'unknown') return 'known';
      return (await this.#isStoredFirst(failedEnd(id, 0, error), encoding)) ? error.code : 'known';
    }
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
    this.#parts.log.warn({ requestId: id }, `${problem}; ${advice}`);
    throw new LaminaError('unavailable', problem, { retryAfterMs: FORMER_ANSWER_RETRY_MS });
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

function generatedId({ sequence }: DurablePrompt): string {
  return `p${sequence}`;
}

/** @throws LaminaError `invalid_request` */
function idOf({ request }: ParsedGenerateBody, prompt: DurablePrompt): string {
  const given = request.id ?? prompt.header(MESSAGE_ID_HEADER);
  if (given === undefined) return generatedId(prompt);
  const checked = idSchema.safeParse(given);
  if (checked.success) return checked.data;
  const problem = checked.error.issues[0]?.message ?? 'is no id';
  throw new LaminaError('invalid_request', `the header ${MESSAGE_ID_HEADER}, which is the id here, ${problem}`);
}

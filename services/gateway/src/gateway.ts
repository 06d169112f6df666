/**
 * Owns the set of open requests: from a body on `lamina.v1.generate` to an open relay, cancels, reconnections, drain.
 *
 * Invariants
 * 1. Every body that came with a reply subject gets exactly one last message; one without is counted and not run.
 * 2. An id is open at most once; it is reserved before anything is awaited.
 * 3. At most `maxOpenRequests` requests are open, those in admission included.
 */
import { randomBytes } from 'node:crypto';
import type { BusMessage } from '@lamina/bus';
import {
  encodingOf,
  FINAL_HEADER,
  type GenerateRequest,
  idSchema,
  type ParsedGenerateBody,
  parseGenerateBody,
  requestIdOf,
} from '@lamina/protocol';
import type { Logger } from '@lamina/runtime';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { admit, promptOf, type ServedModel } from './admission.ts';
import { type ClusterView, requireAvailable } from './cluster-view.ts';
import type { GatewayMetrics } from './gateway-metrics.ts';
import type { PromptTokenizer } from './prompt-tokenizer.ts';
import { type AnswerSink, Relay, type RelayEvents, type RelayLinks } from './relay.ts';

export interface GatewayParts {
  readonly model: ServedModel;
  readonly prompts: Pick<PromptTokenizer, 'encode'>;
  readonly cluster: Pick<ClusterView, 'recent'>;
  readonly links: RelayLinks & { readonly tokens: { has(requestId: string): Promise<boolean> } };
  /** Publishes one reply; `headers` is empty for all but the last. */
  readonly reply: (subject: string, data: Uint8Array, headers: Readonly<Record<string, string>>) => void;
  readonly maxOpenRequests: number;
  readonly log: Pick<Logger, 'debug' | 'error'>;
}

const ID_BYTES = 15;
const NO_HEADERS = {};
const FINAL_HEADERS = { [FINAL_HEADER]: 'true' };

export class Gateway {
  readonly #parts: GatewayParts;
  readonly #metrics: () => GatewayMetrics;
  readonly #open = new Map<string, Relay>();
  /** Aborted when the relay closes, so that its prompt gives up its place before the tokenizer. */
  readonly #closing = new WeakMap<Relay, AbortController>();
  #onIdle: (() => void) | undefined;

  /** `metrics` is asked late, because the gauge in it reads this gateway. */
  constructor(parts: GatewayParts, metrics: () => GatewayMetrics) {
    this.#parts = parts;
    this.#metrics = metrics;
  }

  get openRequests(): number {
    return this.#open.size;
  }

  /** One message on `lamina.v1.generate`. */
  handleGenerate(message: Pick<BusMessage, 'data' | 'reply'>): void {
    const { reply, data } = message;
    if (reply === undefined) {
      this.#metrics().ignored.inc({ reason: 'no_reply' });
      this.#parts.log.debug('a prompt without a reply subject was ignored');
      return;
    }
    const sink: AnswerSink = {
      send: (_, bytes, isFinal) => this.#parts.reply(reply, bytes, isFinal ? FINAL_HEADERS : NO_HEADERS),
    };
    let parsed: ParsedGenerateBody;
    try {
      parsed = parseGenerateBody(data);
    } catch (cause) {
      const relay = this.#createRelay(requestIdOf(data) ?? createId(), encodingOf(data), sink);
      this.#fail(relay, cause);
      return;
    }
    this.open(parsed, sink);
  }

  /** Starts answering a request into `sink`. The one entrance for every protocol that a gateway speaks. */
  open({ request, encoding }: ParsedGenerateBody, sink: AnswerSink): Relay {
    const relay = this.#createRelay(request.id ?? createId(), encoding, sink);
    if (this.#open.has(relay.id)) {
      this.#fail(relay, new LaminaError('duplicate_id', `a request with the id "${relay.id}" is running`));
    } else if (this.#open.size >= this.#parts.maxOpenRequests) {
      const limit = this.#parts.maxOpenRequests;
      this.#fail(relay, new LaminaError('overloaded', `this gateway answers ${limit} requests already; retry later`));
    } else {
      this.#open.set(relay.id, relay);
      this.#start(relay, request, encoding).catch((cause: unknown) => this.#fail(relay, cause));
    }
    return relay;
  }

  /** One message on `lamina.v1.cancel.<id>`. */
  handleCancel(subject: string): void {
    const id = idSchema.safeParse(subject.slice(subject.lastIndexOf('.') + 1));
    if (id.success) this.#open.get(id.data)?.cancel();
    else this.#metrics().ignored.inc({ reason: 'bad_cancel_id' });
  }

  /** Messages may have been lost while the connection was down. */
  handleReconnect(): void {
    for (const relay of this.#open.values()) void relay.repair();
  }

  /** Waits for the open requests; what is still open after `graceMs` is answered as unavailable. */
  async drain(graceMs: number): Promise<void> {
    if (this.#open.size === 0) return;
    let timer: NodeJS.Timeout | undefined;
    const idle = new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
    const grace = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, graceMs);
    });
    await Promise.race([idle, grace]);
    clearTimeout(timer);
    for (const relay of [...this.#open.values()]) {
      this.#parts.links.publishCancel(relay.id);
      this.#fail(relay, new LaminaError('unavailable', 'the gateway shuts down; retry later'));
    }
  }

  async #start(relay: Relay, request: GenerateRequest, encoding: ParsedGenerateBody['encoding']): Promise<void> {
    const { model, prompts, cluster, links } = this.#parts;
    const nowMs = Date.now();
    const prompt = promptOf(request, model);
    const closing = new AbortController();
    this.#closing.set(relay, closing);
    const deadlineAtMs = request.deadline_ms === undefined ? undefined : nowMs + request.deadline_ms;
    const end = { signal: closing.signal, deadlineAtMs };
    const tokenIds = 'tokenIds' in prompt ? prompt.tokenIds : await prompts.encode(prompt, end);
    // Length problems are the client's, whether or not the cluster is up: they come first.
    const facts = { id: relay.id, encoding, nowMs, randomSeed: randomBytes(6).readUIntBE(0, 6) };
    admit(request, tokenIds, model, { ...facts, kvCapacityTokens: Number.POSITIVE_INFINITY });
    const { kvCapacityTokens } = requireAvailable(await cluster.recent());
    const item = admit(request, tokenIds, model, { ...facts, kvCapacityTokens });
    if (request.id !== undefined && (await links.tokens.has(relay.id))) {
      throw new LaminaError('duplicate_id', `the id "${relay.id}" was used a short time ago; choose another`);
    }
    await relay.submit(item);
  }

  #createRelay(id: string, encoding: ParsedGenerateBody['encoding'], sink: AnswerSink): Relay {
    const metrics = this.#metrics();
    const startedAt = performance.now();
    let lastTokensAt: number | undefined;
    const events: RelayEvents = {
      onTokens: (count) => {
        const now = performance.now();
        if (lastTokensAt === undefined) metrics.timeToFirstTokenSeconds.observe((now - startedAt) / 1000);
        else metrics.interTokenSeconds.observe((now - lastTokensAt) / 1000 / count);
        lastTokensAt = now;
        metrics.tokens.inc(count);
      },
      onRepair: () => metrics.repairs.inc(),
      onClosed: (relay, outcome) => {
        this.#closing.get(relay)?.abort();
        metrics.requests.inc({ outcome });
        if (this.#open.get(id) === relay) this.#open.delete(id);
        if (this.#open.size === 0) this.#onIdle?.();
      },
    };
    return new Relay(id, encoding, sink, this.#parts.links, events);
  }

  #fail(relay: Relay, cause: unknown): void {
    const error = asLaminaError(cause);
    if (error.code === 'internal') this.#parts.log.error({ err: error, requestId: relay.id }, 'request failed');
    relay.fail(error);
  }
}

/** Safe as a subject token. */
function createId(): string {
  return randomBytes(ID_BYTES).toString('base64url');
}

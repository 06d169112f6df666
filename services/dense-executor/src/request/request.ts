/**
 * Owns one request on this executor: its tokens, its block table and its actor.
 *
 * Invariants
 * 1. The tokens are the truth and KV is a cache: numComputed tokens have theirs stored, the rest is computed again.
 * 2. kvGeneration grows whenever KV is given up, so a step that began before is recognised as stale.
 * 3. Blocks are freed only when no step in flight can still write to them.
 */
import type { AnswerWriter, StoredAnswer, WorkLease } from '@lamina/bus';
import type { BlockRef, WorkItem } from '@lamina/protocol';
import type { ActorRefFrom } from 'xstate';
import type { Client } from '../scheduling/clients.ts';
import type { PromptLookup } from '../scheduling/prompt-lookup.ts';
import type { Answer } from './answer.ts';
import type { RequestPhase, requestMachine } from './machine.ts';

/** Of a request that was not given KV yet. */
export const NO_TURN = Number.POSITIVE_INFINITY;

export class GenerationRequest {
  readonly item: WorkItem;
  readonly answer: Answer;
  readonly writer: AnswerWriter;
  readonly client: Client;
  /** Its turn among all that were given KV, kept until its end: the later it is, the sooner it is preempted. */
  kvTurn = NO_TURN;
  /** Prompt and generated tokens. */
  readonly tokens: number[];
  lease: WorkLease;
  /** How often the item had been given out when this executor got it, since something of its answer was stored. */
  readonly #numVainDeliveries: number;
  readonly #numTokensBefore: number;
  actor: ActorRefFrom<typeof requestMachine> | undefined;
  /** Made when the first draft is asked for. */
  lookup: PromptLookup | undefined;
  phase: RequestPhase = 'queued';
  /** Tokens whose KV is stored, from the first one on. */
  numComputed = 0;
  /** Entry i is block numTrimmedBlocks + i; block b holds tokens [b * blockSizeTokens, (b + 1) * blockSizeTokens). */
  blockTable: BlockRef[] = [];
  /** Blocks at the start that were given back, because no later token sees them. */
  numTrimmedBlocks = 0;
  kvGeneration = 0;
  /** Wave it belongs to, or -1. */
  waveIndex = -1;
  isInStep = false;
  isExtending = false;
  /** Wanted more blocks and was refused: it waits for capacity. */
  isStarved = false;
  /** A shard of it did not listen: it is tried again in a moment. */
  isHeldBack = false;
  /** It was in a step that failed for what may be one of its requests' own reason: its next step has no other request. */
  runsAlone = false;
  /** Steps in a row that failed because a frame was refused. */
  numRefusals = 0;
  /** Its KV is to be freed as soon as the step in flight ends. */
  isReleasePending = false;
  /** A shard with blocks of it went away while a step was in flight. */
  isKvLost = false;

  /** @param stored The part of its answer that there is already. */
  constructor(
    item: WorkItem,
    lease: WorkLease,
    answer: Answer,
    writer: AnswerWriter,
    client: Client,
    stored: Pick<StoredAnswer, 'tokens' | 'deliveryCount'> = { tokens: [], deliveryCount: 0 },
  ) {
    this.item = item;
    this.lease = lease;
    this.answer = answer;
    this.writer = writer;
    this.client = client;
    this.tokens = [...item.tokenIds];
    for (const { token } of stored.tokens) if (token !== null) this.tokens.push(token);
    this.#numTokensBefore = this.tokens.length;
    // A queue that was made anew counts from 1.
    const isCountedAnew = lease.deliveryCount < stored.deliveryCount;
    this.#numVainDeliveries = isCountedAnew ? lease.deliveryCount : lease.deliveryCount - stored.deliveryCount;
  }

  /** How often the item was given out since something of its answer was stored; 1 when this executor got further. */
  get vainDeliveryCount(): number {
    return this.tokens.length > this.#numTokensBefore ? 1 : Math.max(1, this.#numVainDeliveries);
  }

  get id(): string {
    return this.item.id;
  }

  /** Most tokens whose KV it can need: the last generated token is never attended. */
  get maxKvTokens(): number {
    return this.item.tokenIds.length + this.item.maxTokens - 1;
  }

  /** Blocks that it has or had since its KV was last given up: the room of its table. */
  get numTableBlocks(): number {
    return this.numTrimmedBlocks + this.blockTable.length;
  }

  /** Whether it has blocks and is to keep them. */
  get holdsKv(): boolean {
    return this.numTableBlocks > 0 && !this.isReleasePending;
  }

  get isRunnable(): boolean {
    return (this.phase === 'prefill' || this.phase === 'decode') && !this.isInStep && !this.isHeldBack;
  }

  hasBlocksOn(shardId: string): boolean {
    return this.blockTable.some((block) => block.shardId === shardId);
  }
}

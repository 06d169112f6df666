/**
 * Owns one request on this executor: its tokens, its block table and its actor.
 *
 * Invariants
 * 1. The tokens are the truth and KV is a cache: numComputed tokens have theirs stored, the rest is computed again.
 * 2. kvGeneration grows whenever KV is given up, so a step that began before is recognised as stale.
 * 3. Blocks are freed only when no step in flight can still write to them.
 */
import type { WorkLease } from '@lamina/bus';
import type { BlockRef, WorkItem } from '@lamina/protocol';
import type { ActorRefFrom } from 'xstate';
import type { Answer } from './answer.ts';
import type { RequestPhase, requestMachine } from './machine.ts';

export class GenerationRequest {
  readonly item: WorkItem;
  readonly answer: Answer;
  /** Position in the order of arrival: older requests come first and are preempted last. */
  readonly arrival: number;
  /** Prompt and generated tokens. */
  readonly tokens: number[];
  lease: WorkLease;
  actor: ActorRefFrom<typeof requestMachine> | undefined;
  phase: RequestPhase = 'queued';
  /** Tokens whose KV is stored, from the first one on. */
  numComputed = 0;
  /** Entry i holds tokens [i * blockSizeTokens, (i + 1) * blockSizeTokens). */
  blockTable: BlockRef[] = [];
  kvGeneration = 0;
  /** Wave it belongs to, or -1. */
  waveIndex = -1;
  isInStep = false;
  isExtending = false;
  /** Wanted more blocks and was refused: it waits for capacity. */
  isStarved = false;
  /** Its KV is to be freed as soon as the step in flight ends. */
  isReleasePending = false;
  /** A shard with blocks of it went away while a step was in flight. */
  isKvLost = false;

  constructor(item: WorkItem, lease: WorkLease, answer: Answer, arrival: number) {
    this.item = item;
    this.lease = lease;
    this.answer = answer;
    this.arrival = arrival;
    this.tokens = [...item.tokenIds];
  }

  get id(): string {
    return this.item.id;
  }

  /** Most tokens whose KV it can need: the last generated token is never attended. */
  get maxKvTokens(): number {
    return this.item.tokenIds.length + this.item.maxTokens - 1;
  }

  get isRunnable(): boolean {
    return (this.phase === 'prefill' || this.phase === 'decode') && !this.isInStep;
  }

  hasBlocksOn(shardId: string): boolean {
    return this.blockTable.some((block) => block.shardId === shardId);
  }
}

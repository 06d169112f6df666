/**
 * Owns the typed table of every NATS subject and JetStream stream of Lamina. docs/subjects.md is checked against it.
 *
 * Invariants
 * 1. No other file spells a subject.
 * 2. An endpoint's request and reply are schema-checked by whoever receives them.
 */
import type { z } from 'zod';
import { generateRequestSchema } from './generate-request.ts';
import * as kv from './kv-messages.ts';
import { tokenMessageSchema } from './token-message.ts';
import { workItemSchema } from './work-item.ts';

const ROOT = 'lamina.v1';

/** Request/reply on the control plane: msgpack maps, answered with `{ok}` or `{error}`. */
export interface Endpoint<Request, Reply> {
  readonly subject: string;
  readonly from: string;
  readonly to: string;
  readonly meaning: string;
  readonly request: z.ZodType<Request>;
  readonly reply: z.ZodType<Reply>;
}

/** Core NATS message without a reply: a msgpack map. */
export interface EventSubject<Body> {
  readonly subject: string;
  readonly from: string;
  readonly to: string;
  readonly meaning: string;
  readonly body: z.ZodType<Body>;
}

const endpoint = <Request, Reply>(entry: Endpoint<Request, Reply>): Endpoint<Request, Reply> => entry;
const event = <Body>(entry: EventSubject<Body>): EventSubject<Body> => entry;

export const ENDPOINTS = {
  executorHeartbeat: endpoint({
    subject: `${ROOT}.kv.executor_heartbeat`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning:
      'Registers an executor and the attention spec of its model; repeated so that its blocks are freed when it dies.',
    request: kv.executorHeartbeatSchema,
    reply: kv.executorHeartbeatReplySchema,
  }),
  executorLeave: endpoint({
    subject: `${ROOT}.kv.executor_leave`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning:
      'An executor that shuts down says so: its blocks are free as soon as the shards take nothing more from it.',
    request: kv.executorLeaveSchema,
    reply: kv.emptySchema,
  }),
  shardHeartbeat: endpoint({
    subject: `${ROOT}.kv.shard_heartbeat`,
    from: 'attention-shard',
    to: 'kv-manager',
    meaning:
      'Registers a shard and its memory; the reply tells it the KV layout. A shard that stops sending it is lost.',
    request: kv.shardHeartbeatSchema,
    reply: kv.shardHeartbeatReplySchema,
  }),
  shardLeave: endpoint({
    subject: `${ROOT}.kv.shard_leave`,
    from: 'attention-shard',
    to: 'kv-manager',
    meaning: 'A shard that shuts down says so, instead of being missed.',
    request: kv.shardLostSchema,
    reply: kv.emptySchema,
  }),
  suspectShard: endpoint({
    subject: `${ROOT}.kv.suspect_shard`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning:
      'A shard owes an answer: the kv-manager asks it now, instead of waiting for its silence to be long enough.',
    request: kv.shardLostSchema,
    reply: kv.suspectReplySchema,
  }),
  allocate: endpoint({
    subject: `${ROOT}.kv.allocate`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning: 'A new block table for a request.',
    request: kv.allocateSchema,
    reply: kv.blocksReplySchema,
  }),
  extend: endpoint({
    subject: `${ROOT}.kv.extend`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning: 'More blocks at the end of a block table; the reply has only the added ones.',
    request: kv.extendSchema,
    reply: kv.blocksReplySchema,
  }),
  trim: endpoint({
    subject: `${ROOT}.kv.trim`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning:
      'Gives back blocks at the start of a table, which no later token can see (models whose layers all have a window).',
    request: kv.trimSchema,
    reply: kv.emptySchema,
  }),
  free: endpoint({
    subject: `${ROOT}.kv.free`,
    from: 'dense-executor',
    to: 'kv-manager',
    meaning: 'Frees every block of a request; freeing an unknown one is no error.',
    request: kv.freeSchema,
    reply: kv.emptySchema,
  }),
  kvStatus: endpoint({
    subject: `${ROOT}.kv.status`,
    from: 'gateway, cli',
    to: 'kv-manager',
    meaning: 'Who is registered and how full the KV cache is.',
    request: kv.emptySchema,
    reply: kv.kvStatusSchema,
  }),
} as const;

export const EVENTS = {
  shardLost: event({
    subject: `${ROOT}.kv.shard_lost`,
    from: 'kv-manager',
    to: 'dense-executor',
    meaning: 'A shard left or stopped answering: what it held is gone.',
    body: kv.shardLostSchema,
  }),
  capacityFreed: event({
    subject: `${ROOT}.kv.capacity_freed`,
    from: 'kv-manager',
    to: 'dense-executor',
    meaning: 'Blocks became free after an allocation had been refused as overloaded.',
    body: kv.capacityFreedSchema,
  }),
} as const;

/** JetStream streams that Lamina owns. */
export const STREAMS = {
  prompts: {
    name: 'LAMINA_PROMPTS',
    subjects: [`${ROOT}.prompts`],
    durableConsumer: 'gateways',
    meaning:
      'Prompts that were submitted for good (work queue; acknowledged when their request is in LAMINA_WORK or ended). Full means refused.',
    body: generateRequestSchema,
  },
  work: {
    name: 'LAMINA_WORK',
    subjects: [`${ROOT}.work.*.*`],
    durableConsumer: 'dense-executors',
    meaning:
      'Validated, tokenized prompts that wait for an executor (work queue; acknowledged when the answer is complete).',
    body: workItemSchema,
  },
  tokens: {
    name: 'LAMINA_TOKENS',
    subjects: [`${ROOT}.tokens.*`],
    durableConsumer: null,
    meaning: 'Every answer, token by token, replayable from any index.',
    body: tokenMessageSchema,
  },
} as const;

export const SUBJECTS = {
  /** Request with streamed replies; body: text, JSON object or msgpack map. */
  generate: `${ROOT}.generate`,
  /** Durable submission by JetStream publish; body as for `generate`. */
  prompts: `${ROOT}.prompts`,
  /** Scraped by a gateway: every instance answers with its metrics as JSON. */
  metrics: `${ROOT}.metrics`,
  /** Stats of one instance, as in $SRV.STATS, msgpack. */
  status: (instanceId: string): string => `${ROOT}.status.${instanceId}`,
  cancelAll: `${ROOT}.cancel.*`,
  cancel: (requestId: string): string => `${ROOT}.cancel.${requestId}`,
  tokens: (requestId: string): string => `${ROOT}.tokens.${requestId}`,
  /** Of the key that the stream was made with: no client may know it. */
  work: (key: string, requestId: string): string => `${ROOT}.work.${key}.${requestId}`,
  /** Tensor plane: plans and QKV to a shard. */
  shardTensors: (shardId: string): string => `${ROOT}.tensor.shard.${shardId}`,
  /** Answered with an empty message by a shard that is alive. */
  shardProbe: (shardId: string): string => `${ROOT}.shard.${shardId}.probe`,
  /**
   * Tensor plane: partial attention back to one worker thread of an executor. Wave and shard stand in the subject so that
   * the server's own answer (nobody listens: an empty message) says which shard is gone.
   */
  workerTensors: (workerId: string, wave: number | string, shardIndex: number | string): string =>
    `${ROOT}.tensor.worker.${workerId}.${wave}.${shardIndex}`,
} as const;

/** Queue group of all gateways on `lamina.v1.generate`. */
export const GATEWAY_QUEUE = 'lamina-gateways';

/** Names under which services answer $SRV.PING, INFO and STATS. */
export const SERVICE_NAMES = {
  gateway: 'lamina-gateway',
  'dense-executor': 'lamina-dense-executor',
  'attention-shard': 'lamina-attention-shard',
  'kv-manager': 'lamina-kv-manager',
} as const;
export type ServiceName = keyof typeof SERVICE_NAMES;

export const SUBJECT_NOTES: readonly { subject: string; kind: string; from: string; to: string; meaning: string }[] = [
  {
    subject: SUBJECTS.generate,
    kind: 'request, streamed replies',
    from: 'client',
    to: 'gateway (queue group)',
    meaning:
      'Body: UTF-8 text = the prompt, or a JSON object, or a msgpack map. One reply per token (several may share one); the last has the header `Lamina-Final: true`.',
  },
  {
    subject: SUBJECTS.prompts,
    kind: 'JetStream LAMINA_PROMPTS',
    from: 'client',
    to: 'gateway',
    meaning:
      'Body as for `lamina.v1.generate`. The PubAck means accepted: the answer comes on `lamina.v1.tokens.<id>`, errors too. Id: `id` of the body, else the header `Nats-Msg-Id`, else `p<stream sequence>`.',
  },
  {
    subject: SUBJECTS.cancel('<id>'),
    kind: 'message',
    from: 'client, gateway',
    to: 'gateway, dense-executor',
    meaning: 'Stops the request everywhere and frees its KV. The body is ignored.',
  },
  {
    subject: SUBJECTS.tokens('<id>'),
    kind: 'JetStream LAMINA_TOKENS',
    from: 'dense-executor, gateway',
    to: 'gateway, client',
    meaning: STREAMS.tokens.meaning,
  },
  {
    subject: SUBJECTS.work('<key>', '<id>'),
    kind: 'JetStream LAMINA_WORK',
    from: 'gateway',
    to: 'dense-executor',
    meaning: STREAMS.work.meaning,
  },
  {
    subject: SUBJECTS.metrics,
    kind: 'request, many replies',
    from: 'gateway',
    to: 'every service',
    meaning: 'Metrics of one instance as JSON; the gateway joins them in /metrics.',
  },
  {
    subject: SUBJECTS.status('<$SRV id>'),
    kind: 'request',
    from: 'anyone',
    to: 'every service',
    meaning: 'What one instance says about itself: the `data` of its answer to $SRV.STATS, as msgpack.',
  },
  {
    subject: SUBJECTS.shardProbe('<shardId>'),
    kind: 'request',
    from: 'kv-manager',
    to: 'attention-shard',
    meaning: 'Asks a shard that an executor suspects whether it is alive; the answer is empty.',
  },
  {
    subject: SUBJECTS.shardTensors('<shardId>'),
    kind: 'tensor plane',
    from: 'dense-executor',
    to: 'attention-shard',
    meaning: 'Step plans, then one QKV message per layer.',
  },
  {
    subject: SUBJECTS.workerTensors('<workerId>', '<wave>', '<shardIndex>'),
    kind: 'tensor plane',
    from: 'attention-shard',
    to: 'dense-executor',
    meaning: 'Partial attention output and log-sum-exp of one layer, or a failure.',
  },
];

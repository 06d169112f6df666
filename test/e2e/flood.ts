/**
 * Owns what the hostile tests send: a message that would be taken for every subject that somebody listens to, and mutations
 * of these over NATS and HTTP.
 */
import { connect as connectSocket } from 'node:net';
import {
  decodeTokens,
  ENDPOINTS,
  EVENTS,
  emptyFrameHeader,
  encodeStepPlan,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  packMessage,
  requestIdOf,
  SERVICE_NAMES,
  STREAMS,
  SUBJECTS,
  writeFrameHeader,
} from '@lamina/protocol';
import type { NatsConnection } from 'nats';
import { mutate, randomOf } from '../mutate.ts';

const BATCH = 100;
/** Prompts of the fuzzer that are open at a time. */
const OPEN_PROMPTS = 32;

function frame(header: Partial<FrameHeader>, body: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(FRAME_HEADER_BYTES + body.length);
  bytes.set(body, FRAME_HEADER_BYTES);
  writeFrameHeader(bytes, { ...emptyFrameHeader(), bodyBytes: body.length, originId: 77, stepId: 1, ...header });
  return bytes;
}

const SPEC = { numLayers: 2, numHeads: 4, numKvHeads: 2, headDim: 32, scale: 0.25 };
const PLAN = encodeStepPlan({
  numQueryRows: 2,
  numKvRows: 1,
  segments: Int32Array.of(0, 1, 17, 0, 2, 1, 1, 0, 2, 1),
  blocks: Int32Array.of(5, 0, 16, 9, 16, 2),
  kvSlots: Int32Array.of(145),
}).subarray(FRAME_HEADER_BYTES);
const WORK = {
  id: 'w',
  model: 'm',
  tokenIds: [1, 300],
  maxTokens: 10,
  sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 7 },
  stop: [],
  logprobs: null,
  ignoreEos: false,
  priority: 0,
  deadlineAtMs: null,
  encoding: 'json',
  submittedAtMs: 1_700_000_000_000,
};
const TOKEN = { id: 'beside-0', index: 3, token: 5, text: 'x', finish_reason: null };

/** Whom to send to. */
export interface Targets {
  readonly shardIds: readonly string[];
  readonly workerId: string;
  readonly workKey: string;
  /** Ids of $SRV of all services. */
  readonly statusIds: readonly string[];
}

/** A message that would be taken, for every subject that somebody listens to. */
export function seedsOf({ shardIds, workerId, workKey, statusIds }: Targets): [string, Uint8Array[]][] {
  const bodies: Readonly<Record<keyof typeof ENDPOINTS, object>> = {
    executorHeartbeat: { executorId: 'e1', modelId: 'm', spec: SPEC, originIds: [7] },
    executorLeave: { executorId: 'e1' },
    shardHeartbeat: { shardId: 's1', budgetBytes: 5, kernel: 'k', numBlocks: null, fencedUpTo: 0 },
    shardLeave: { shardId: 's1' },
    suspectShard: { shardId: 's1' },
    allocate: { requestId: 'a', executorId: 'e1', numTokens: 5, maxTokens: 9, deliveryCount: 1 },
    extend: { requestId: 'a', executorId: 'e1', numBlocks: 1, numTokens: 5 },
    trim: { requestId: 'a', executorId: 'e1', numFreedBlocks: 1 },
    free: { requestId: 'a', executorId: 'e1' },
    kvStatus: {},
  };
  const endpoints = Object.entries(ENDPOINTS).map(([name, { subject }]): [string, Uint8Array[]] => {
    const body = Object.entries(bodies).find(([key]) => key === name)?.[1];
    return [subject, [packMessage(body)]];
  });
  const tensors = [
    frame({ kind: FRAME_KIND.plan }, PLAN),
    frame({ kind: FRAME_KIND.attend }, new Uint8Array(64)),
    frame({ kind: FRAME_KIND.partial, layer: 1 }, new Uint8Array(64)),
    frame({ kind: FRAME_KIND.failure }, packMessage({ code: 'internal', message: 'm' })),
  ];
  return [
    ...endpoints,
    [EVENTS.shardLost.subject, [packMessage({ shardId: 's1' })]],
    [EVENTS.capacityFreed.subject, [packMessage({ freeBlocks: 5 })]],
    [SUBJECTS.metrics, [packMessage({})]],
    ...statusIds.map((id): [string, Uint8Array[]] => [SUBJECTS.status(id), [packMessage({})]]),
    ...['PING', 'INFO', 'STATS'].flatMap((verb) =>
      ['', ...Object.values(SERVICE_NAMES).map((name) => `.${name}`)].map((tail): [string, Uint8Array[]] => [
        `$SRV.${verb}${tail}`,
        [packMessage({}), new Uint8Array()],
      ]),
    ),
    ...shardIds.map((id): [string, Uint8Array[]] => [SUBJECTS.shardProbe(id), [new Uint8Array(), packMessage({})]]),
    [SUBJECTS.cancel('w'), [packMessage({})]],
    [SUBJECTS.cancel('*'), [packMessage({})]],
    [SUBJECTS.work(workKey, 'w'), [packMessage(WORK)]],
    [SUBJECTS.tokens('nobody'), [packMessage(TOKEN), Buffer.from(JSON.stringify(TOKEN))]],
    ...shardIds.map((id): [string, Uint8Array[]] => [SUBJECTS.shardTensors(id), tensors]),
    [SUBJECTS.workerTensors(workerId, 0, 0), tensors],
    [SUBJECTS.workerTensors(workerId, 'x', 99), tensors],
  ];
}

/** A stream confirms there what it takes, whatever the subject; a service must refuse to answer there. */
const REPLIES = [
  '_INBOX.nobody',
  SUBJECTS.work('k', 'w'),
  SUBJECTS.tokens('w'),
  SUBJECTS.prompts,
  SUBJECTS.cancel('w'),
  SUBJECTS.metrics,
  ENDPOINTS.free.subject,
  EVENTS.shardLost.subject,
  ...Object.values(STREAMS).flatMap(({ name }) => [
    `$JS.API.STREAM.PURGE.${name}`,
    `$JS.API.STREAM.MSG.DELETE.${name}`,
    `$JS.API.STREAM.UPDATE.${name}`,
    `$JS.API.STREAM.DELETE.${name}`,
  ]),
  '$JS.API.CONSUMER.DELETE.LAMINA_WORK.dense-executors',
  '$JS.API.CONSUMER.MSG.NEXT.LAMINA_WORK.dense-executors',
];

export async function flood(
  nats: NatsConnection,
  subject: string,
  seeds: readonly Uint8Array[],
  cases: number,
): Promise<void> {
  const random = randomOf(subject.length);
  for (let done = 0; done < cases; done++) {
    nats.publish(subject, mutate(seeds, random), { reply: REPLIES[done % REPLIES.length]! });
    if (done % BATCH === BATCH - 1) await nats.flush();
  }
  await nats.flush();
}

const PROMPT = { prompt: 'Once upon a time', max_tokens: 5, temperature: 0.5, stop: ['x'], logprobs: 3 };

/**
 * Mutated prompts on lamina.v1.prompts, most of them under an id that is taken. Returns the ids of all that the server took:
 * each must be answered.
 */
export async function floodDurablePrompts(nats: NatsConnection, cases: number): Promise<Set<string>> {
  const ids = new Set<string>();
  const jetstream = nats.jetstream();
  const seeds = [
    Buffer.from(JSON.stringify({ ...PROMPT, id: 'taken' })),
    packMessage({ ...PROMPT, id: 'taken-too' }),
    Buffer.from(JSON.stringify({ max_tokens: 3, prompt: 'It was' })),
    Buffer.from('Once upon'),
  ];
  const random = randomOf(9);
  let left = cases;
  const worker = async (): Promise<void> => {
    while (left-- > 0) {
      const body = mutate(seeds, random);
      const headerId = random(4) === 0 ? `header-${random(1 + cases / 8)}` : undefined;
      const { seq, duplicate } = await jetstream.publish(SUBJECTS.prompts, body, {
        ...(headerId !== undefined && { msgID: headerId }),
        timeout: 20_000,
      });
      // Of a message id that the server remembers it is the number of the first, whose body is another.
      if (duplicate) continue;
      const id = requestIdOf(body) ?? headerId ?? `p${seq}`;
      ids.add(id);
      // Those whose max_tokens has grown would take long.
      if (random(2) === 0) nats.publish(SUBJECTS.cancel(id));
    }
  };
  await Promise.all(Array.from({ length: OPEN_PROMPTS }, worker));
  return ids;
}

/** Mutated prompts; those that are taken are cancelled after some tokens. */
export async function floodPrompts(nats: NatsConnection, cases: number): Promise<void> {
  const request = { ...PROMPT, id: 'fuzz' };
  const seeds = [Buffer.from(JSON.stringify(request)), packMessage({ ...request, id: 'f2' }), Buffer.from('Once upon')];
  const random = randomOf(7);
  const ask = async (): Promise<void> => {
    for await (const reply of await nats.requestMany(SUBJECTS.generate, mutate(seeds, random), { maxWait: 60_000 })) {
      const [first] = decodeTokens(reply.data);
      if (reply.headers?.get('Lamina-Final') === 'true') return;
      if (first !== undefined) nats.publish(SUBJECTS.cancel(first.id));
    }
    throw new Error('a prompt got no last message');
  };
  let left = cases;
  const worker = async (): Promise<void> => {
    while (left-- > 0) await ask();
  };
  await Promise.all(Array.from({ length: OPEN_PROMPTS }, worker));
}

const HTTP_BODY = JSON.stringify({ model: 'm', prompt: 'x' });
const CLOSE = 'Host: x\r\nConnection: close\r\n';
export const HTTP_PROMPTS = [
  `GET /health HTTP/1.1\r\n${CLOSE}\r\n`,
  `GET /metrics?x=%2e HTTP/1.1\r\n${CLOSE}\r\n`,
  `POST /v1/completions HTTP/1.1\r\n${CLOSE}Content-Type: application/json\r\nContent-Length: ${HTTP_BODY.length}\r\n\r\n${HTTP_BODY}`,
  'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
];
/** Of requests that run, have ended and never were. */
export const HTTP_REQUESTS = ['fuzz', 'taken', 'w', 'nobody'].flatMap((id) => [
  `GET /v1/requests/${id} HTTP/1.1\r\n${CLOSE}\r\n`,
  `GET /v1/requests/${id}/events HTTP/1.1\r\n${CLOSE}Last-Event-ID: 3\r\n\r\n`,
  `DELETE /v1/requests/${id} HTTP/1.1\r\n${CLOSE}\r\n`,
]);

export async function floodHttp(port: number, texts: readonly string[], cases: number): Promise<void> {
  const seeds = texts.map((text) => Buffer.from(text));
  const random = randomOf(80);
  const send = (): Promise<void> =>
    new Promise((resolve) => {
      const socket = connectSocket(port, '127.0.0.1');
      const end = (): void => {
        socket.destroy();
        resolve();
      };
      // A request that is not complete is waited for by the server; we do not.
      socket.setTimeout(200, end);
      socket
        .on('error', end)
        .on('close', end)
        .on('data', () => undefined);
      socket.end(mutate(seeds, random));
    });
  let left = cases;
  await Promise.all(
    Array.from({ length: 16 }, async () => {
      while (left-- > 0) await send();
    }),
  );
}

/**
 * Frames of the tensor plane without checksums of their tensors, which is how services run: while a request is computed, what
 * its executor and its shards say is repeated, cut, damaged and sent to others. Its answer stays the undisturbed one.
 *
 * A wrong tensor under a right header could not be told from a right one, so none is sent: a header is damaged without its
 * checksum, or names somebody or a layer that it does not belong to; tensors come again only under the header that they had.
 */
import {
  ENDPOINTS,
  emptyFrameHeader,
  FRAME_HEADER_BYTES,
  FRAME_KIND,
  type FrameHeader,
  readFrameHeader,
  SUBJECTS,
  writeFrameHeader,
} from '@lamina/protocol';
import { startNatsServer } from '@lamina/testkit/nats-server';
import { connect, type Msg, type NatsConnection } from 'nats';
import { afterEach, expect, test } from 'vitest';
import { startTestCluster, type TestCluster } from '../cluster.ts';
import { count, IS_LONG, secondsSince, tell } from '../fuzz-report.ts';
import { randomOf } from '../mutate.ts';

/** Hostile frames for each way to be hostile. */
const CASES = IS_LONG ? 10_000 : 200;
const REMEMBERED = 256;
/** What fails the step in flight, which then runs again: at most one of so many frames. More, and no step would ever end. */
const HARM_ONE_IN = 50;
const HARMFUL_CASES = CASES / 20;
const TELL_EVERY_MS = 15_000;

let tested: TestCluster | undefined;
const cleanUp: (() => Promise<void> | void)[] = [];
afterEach(async ({ task }) => {
  if (task.result?.state === 'fail' && tested !== undefined) console.log(tested.logs());
  await tested?.stop();
  tested = undefined;
  for (const each of cleanUp.splice(0).reverse()) await each();
});

interface Heard {
  readonly subject: string;
  readonly reply: string | undefined;
  readonly data: Uint8Array;
  readonly header: FrameHeader;
}

/** Frames of others that were heard, and what is made of each; `undefined` where a way has nothing to do with such a frame. */
type Way = (heard: Heard, former: readonly Heard[], random: (below: number) => number) => Heard | undefined;

const isTensor = ({ header }: Heard): boolean =>
  header.kind === FRAME_KIND.attend || header.kind === FRAME_KIND.partial;

/** The frame with another header, under a checksum that fits. */
function under(heard: Heard, changes: Partial<FrameHeader>): Heard {
  const data = Uint8Array.from(heard.data);
  const header = { ...heard.header, ...changes };
  writeFrameHeader(data, header);
  return { ...heard, data, header };
}

function cut(heard: Heard, random: (below: number) => number): Heard {
  return { ...heard, data: heard.data.subarray(0, random(heard.data.length)) };
}

/** Ignored, or answered with a failure that nobody waits for. */
const HARMLESS: Readonly<Record<string, Way>> = {
  'once more': (heard) => heard,
  'once more, later': (_, former, random) => former[random(former.length)],
  'of another origin': (heard, _, random) =>
    isTensor(heard) ? under(heard, { originId: random(2 ** 32) }) : undefined,
  'of another wave': (heard, _, random) =>
    isTensor(heard) ? under(heard, { waveIndex: 64 + random(60_000) }) : undefined,
  'of an old step': (heard, _, random) => under(heard, { stepId: (heard.header.stepId - 1 - random(1_000)) >>> 0 }),
  'of a step to come': (heard, _, random) =>
    isTensor(heard) ? under(heard, { stepId: (heard.header.stepId + 1_000_000 + random(1_000)) >>> 0 }) : undefined,
  'of an old layer': (heard, _, random) =>
    isTensor(heard) ? under(heard, { layer: random(heard.header.layer + 1) }) : undefined,
  'a part of the next layer': (heard, _, random) =>
    isTensor(heard) ? cut(under(heard, { layer: heard.header.layer + 1 }), random) : undefined,
  'cut short': (heard, _, random) => (isTensor(heard) ? cut(heard, random) : undefined),
  'too long': (heard, _, random) => ({ ...heard, data: Buffer.concat([heard.data, new Uint8Array(1 + random(64))]) }),
};
/** Each may fail the step in flight. */
const HARMFUL: Readonly<Record<string, Way>> = {
  'to another': (heard, former, random) => {
    const other = former[random(former.length)];
    const isOfOneKind = other !== undefined && other.header.kind === heard.header.kind;
    if (!isOfOneKind || !isTensor(heard) || other.subject === heard.subject) return undefined;
    return { ...heard, subject: other.subject };
  },
  'of another kind': (heard) =>
    isTensor(heard)
      ? under(heard, { kind: heard.header.kind === FRAME_KIND.attend ? FRAME_KIND.partial : FRAME_KIND.attend })
      : undefined,
  // A partial output under the other shard's number would be a wrong tensor under a right header.
  'of another shard, the next layer': (heard, _, random) =>
    isTensor(heard)
      ? under(heard, {
          layer: heard.header.layer + 1,
          shardIndex: heard.header.kind === FRAME_KIND.attend ? 1 - heard.header.shardIndex : 2 + random(1_000),
        })
      : undefined,
  'of a layer that is none': (heard, _, random) =>
    isTensor(heard) ? under(heard, { layer: 1_000 + random(60_000) }) : undefined,
  'of another size, the next layer': (heard, _, random) =>
    isTensor(heard)
      ? under(heard, { layer: heard.header.layer + 1, bodyBytes: heard.header.bodyBytes + 4 * (1 + random(64)) })
      : undefined,
  'a plan cut short': (heard, _, random) => (isTensor(heard) ? undefined : cut(heard, random)),
  'with a damaged header': (heard, _, random) => {
    const data = Uint8Array.from(heard.data);
    for (let flips = 1 + random(3); flips > 0; flips--) data[random(FRAME_HEADER_BYTES)]! ^= 1 << random(8);
    return { ...heard, data };
  },
};

const ALL_HARMFUL = Object.keys(HARMFUL).length * HARMFUL_CASES;
const ALL_CASES = Object.keys(HARMLESS).length * CASES + ALL_HARMFUL;
/** Times that the KV of a request is computed again: for that, four frames in a row have to hit steps of it. */
const MAX_RECOVERIES = Math.ceil(ALL_HARMFUL / 100);

/** Of all executors, since they started. */
async function metricsOf(httpUrl: string): Promise<Record<string, number>> {
  const text = await (await fetch(`${httpUrl}/metrics`)).text();
  const sumOf = (name: string): number =>
    [...text.matchAll(new RegExp(`^${name}(?:\\{.*\\})? (.*)$`, 'gm'))].reduce(
      (sum, [, value]) => sum + Number(value),
      0,
    );
  return {
    steps: sumOf('lamina_steps_total'),
    'failed steps': sumOf('lamina_failed_steps_total'),
    recoveries: sumOf('lamina_recoveries_total'),
    'prompt tokens': sumOf('lamina_prefilled_tokens_total'),
  };
}

/** Hears every tensor frame, and sends one after it that is hostile, until every way had its cases. */
class Hostility {
  readonly numSent = new Map<string, number>();
  readonly #nats: NatsConnection;
  readonly #harmless = new Map(Object.entries(HARMLESS));
  readonly #harmful = new Map(Object.entries(HARMFUL));
  readonly #random = randomOf(31);
  readonly #former: Heard[] = [];
  #numHeard = 0;
  #numSinceHarm = 0;

  constructor(nats: NatsConnection) {
    this.#nats = nats;
    nats.subscribe(SUBJECTS.shardTensors('x').replace('shard.x', '>'), {
      callback: (_, message) => this.#hear(message),
    });
  }

  get numSentInAll(): number {
    let sum = 0;
    for (const numSent of this.numSent.values()) sum += numSent;
    return sum;
  }

  get isOver(): boolean {
    return this.#harmless.size + this.#harmful.size === 0;
  }

  #hear({ subject, reply, data }: Msg): void {
    const header = emptyFrameHeader();
    if (data.length < FRAME_HEADER_BYTES) return;
    readFrameHeader(data, header);
    const heard: Heard = { subject, reply, data: new Uint8Array(data), header };
    // As soon as a frame comes with which one of the ways that are left can do something.
    if (++this.#numSinceHarm >= HARM_ONE_IN && this.#send(heard, this.#harmful, HARMFUL_CASES)) this.#numSinceHarm = 0;
    else this.#send(heard, this.#harmless, CASES);
    this.#former[++this.#numHeard % REMEMBERED] = heard;
  }

  #send(heard: Heard, ways: Map<string, Way>, cases: number): boolean {
    const [name, way] = [...ways][this.#random(ways.size)] ?? [];
    const hostile = way?.(heard, this.#former, this.#random);
    if (name === undefined || hostile === undefined) return false;
    this.#nats.publish(hostile.subject, hostile.data, hostile.reply === undefined ? {} : { reply: hostile.reply });
    const numSent = 1 + (this.numSent.get(name) ?? 0);
    this.numSent.set(name, numSent);
    if (numSent >= cases) ways.delete(name);
    return true;
  }
}

test(
  'frames that are repeated, cut, damaged or meant for others change no answer where tensors have no checksum',
  async () => {
    const server = await startNatsServer();
    cleanUp.push(() => server.stop());
    tested = await startTestCluster({
      natsUrl: server.url,
      // Both shards have blocks of every request.
      settings: { logLevel: 'error', attentionKernel: 'native', spreadAboveTokens: '0', blockSizeTokens: '8' },
    });
    const { cluster, generate } = tested;
    const requests = [0, 1, 2, 3].map((seed) => ({
      prompt: `Once upon a time, there were ${seed} foxes.`,
      temperature: seed === 0 ? 0 : 0.8,
      seed,
      max_tokens: 60,
      ignore_eos: true,
    }));
    const answerAll = async (): Promise<string[]> => {
      const answers = await Promise.all(requests.map((request) => generate(request)));
      return answers.map((messages) => messages.at(-1)?.error?.message ?? messages.map(({ text }) => text).join(''));
    };
    const expected = await answerAll();
    const nats = await connect({ servers: server.url, noEcho: true });
    cleanUp.unshift(() => nats.close());
    const hostility = new Hostility(nats);
    const startedMs = performance.now();
    const metricsBefore = await metricsOf(cluster.httpUrl);
    const done = async (): Promise<string> => {
      const metrics = await metricsOf(cluster.httpUrl);
      const grown = Object.entries(metrics).map(
        ([name, value]) => `${count(value - (metricsBefore[name] ?? 0))} ${name}`,
      );
      return `${count(numAnswers)} answers, ${grown.join(', ')}, in ${secondsSince(startedMs)}`;
    };
    let numAnswers = 0;
    let toldAtMs = startedMs;
    for (; !hostility.isOver; numAnswers += requests.length) {
      expect(await answerAll()).toEqual(expected);
      if (performance.now() - toldAtMs < TELL_EVERY_MS) continue;
      toldAtMs = performance.now();
      tell(`${count(hostility.numSentInAll)} of ${count(ALL_CASES)} hostile frames; ${await done()}`);
    }
    console.log(`${count(hostility.numSentInAll)} hostile frames; ${await done()}`);
    console.log(Object.fromEntries(hostility.numSent));
    // A frame costs no more than a step: KV that is computed again would cost what its request has computed so far.
    const { recoveries } = await metricsOf(cluster.httpUrl);
    expect(recoveries! - metricsBefore.recoveries!).toBeLessThanOrEqual(MAX_RECOVERIES);
    const { shards } = await cluster.bus.request(ENDPOINTS.kvStatus, {}, { timeoutMs: 2_000 });
    expect(shards.map(({ kernel, usedBlocks }) => [kernel.startsWith('native'), usedBlocks])).toEqual([
      [true, 0],
      [true, 0],
    ]);
    await nats.close();
    expect(await answerAll()).toEqual(expected);
  },
  IS_LONG ? 3_600_000 : 120_000,
);

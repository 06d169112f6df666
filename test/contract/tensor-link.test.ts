/** The connection that tensors travel on, native and over nats.js, with a real nats-server or what pretends to be one. */
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { type HeldMemory, openTensorLink, type TensorLink, type TensorLinkKind } from '@lamina/bus';
import { LaminaError } from '@lamina/tensor';
import { type NatsServer, startNatsServer } from '@lamina/testkit/nats-server';
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest';
import { count, IS_LONG, megabytes, secondsSince, tell } from '../fuzz-report.ts';

const eventually = (probe: () => void): Promise<void> => vi.waitFor(probe, { timeout: 5_000, interval: 5 });

const errors: string[] = [];
const events = { onError: (error: LaminaError, subject: string) => void errors.push(`${subject}: ${error.message}`) };

async function open(url: string, kind: TensorLinkKind, connectTimeoutMs = 2_000): Promise<TensorLink> {
  const { link, fallbackReason } = await openTensorLink({ url, name: 'test', connectTimeoutMs }, events, kind);
  expect([link.kind, fallbackReason]).toEqual([kind, null]);
  return link;
}

/** Subject, reply and bytes of every message on `subject`, copied. */
function collect(link: TensorLink, subject: string): [string, string | undefined, Uint8Array][] {
  const seen: [string, string | undefined, Uint8Array][] = [];
  link.subscribe(subject, (message) => seen.push([message.subject, message.reply, Uint8Array.from(message.data)]));
  return seen;
}

describe.each(['native', 'nats'] as const)('%s', (kind) => {
  let server: NatsServer;
  let [a, b]: TensorLink[] = [];
  beforeAll(async () => {
    server = await startNatsServer();
    [a, b] = [await open(server.url, kind), await open(server.url, kind)];
  });
  afterAll(async () => {
    expect([await a!.close(), await b!.close(), a!.isClosed, await a!.close()]).toEqual([true, true, true, true]);
    await server.stop();
    expect(errors.splice(0)).toEqual([]);
  });

  test('messages of every size come whole, in order, each once, both ways at a time', async () => {
    const sizes = [0, 1, 31, 2_345, 32 * 1024 - 1, 32 * 1024, 100_000, 256 * 1024, 700_001, a!.maxPayloadBytes];
    const messages = Array.from({ length: 60 }, (_, i) => randomBytes(sizes[i % sizes.length]!));
    const [atA, atB] = [collect(a!, 'to.a'), collect(b!, 'to.b')];
    await Promise.all([a!.flush(), b!.flush()]);
    for (const message of messages) {
      a!.publish('to.b', message);
      b!.publish('to.a', message, 'answer.here');
    }
    await eventually(() => expect([atA.length, atB.length]).toEqual([60, 60]));
    for (const [i, message] of messages.entries()) {
      expect([atB[i]![0], atB[i]![1]]).toEqual(['to.b', undefined]);
      expect([atA[i]![0], atA[i]![1]]).toEqual(['to.a', 'answer.here']);
      expect(Buffer.compare(atA[i]![2], message) === 0 && Buffer.compare(atB[i]![2], message) === 0, `${i}`).toBe(true);
    }
  });

  test('a wildcard says which subject it was, and nothing comes after unsubscribing', async () => {
    const seen: string[] = [];
    const subscription = a!.subscribe('w.*.x', ({ subject }) => seen.push(subject));
    await a!.flush();
    b!.publish('w.1.x', new Uint8Array(1));
    b!.publish('w.2.x', new Uint8Array(1));
    await eventually(() => expect(seen).toEqual(['w.1.x', 'w.2.x']));
    subscription.unsubscribe();
    await a!.flush();
    b!.publish('w.3.x', new Uint8Array(1));
    await b!.flush();
    await a!.flush();
    expect(seen).toEqual(['w.1.x', 'w.2.x']);
  });

  test('where nobody listens, an empty message comes to the reply', async () => {
    const seen = collect(a!, 'unheard.*');
    await a!.flush();
    a!.publish('nobody', new Uint8Array(9), 'unheard.7');
    await eventually(() =>
      expect(seen.map(([subject, , { length }]) => [subject, length])).toEqual([['unheard.7', 0]]),
    );
  });

  test('a callback that throws is reported, and the next message comes', async () => {
    let numSeen = 0;
    a!.subscribe('throws', () => {
      if (++numSeen === 1) throw new LaminaError('protocol_violation', 'not this one');
    });
    await a!.flush();
    b!.publish('throws', new Uint8Array(1));
    b!.publish('throws', new Uint8Array(1));
    await eventually(() => expect(numSeen).toBe(2));
    expect(errors.splice(0)).toEqual(['throws: not this one']);
  });

  test('what is held stays as it is while a hundred times as much comes', async () => {
    const held: { data: Uint8Array; memory: HeldMemory | undefined }[] = [];
    let numSeen = 0;
    a!.subscribe('hold', (message) => {
      if (numSeen++ % 50 === 0) held.push({ data: message.data, memory: message.hold?.() });
    });
    await a!.flush();
    for (let i = 0; i < 600; i++) {
      b!.publish('hold', new Uint8Array(20_000).fill(i));
      if (i % 40 === 0) await b!.flush();
    }
    await eventually(() => expect(numSeen).toBe(600));
    expect(held.map(({ data }, i) => data.every((byte) => byte === ((i * 50) & 255)))).toEqual(held.map(() => true));
    for (const { memory } of held) memory?.release();
  });

  test('what is published in one turn of the event loop, and while messages come, leaves without being asked', async () => {
    b!.subscribe('ping', ({ data, reply }) => b!.publish(reply!, data));
    const pongs = collect(a!, 'pong');
    await Promise.all([a!.flush(), b!.flush()]);
    for (let i = 0; i < 5; i++) a!.publish('ping', Uint8Array.of(i), 'pong');
    await eventually(() => expect(pongs.map(([, , data]) => data[0])).toEqual([0, 1, 2, 3, 4]));
  });
});

describe('native', () => {
  test('receive blocks until something comes, hands it on, and gives up in time', async () => {
    const server = await startNatsServer();
    const link = await open(server.url, 'native');
    const seen = collect(link, 'mine');
    link.publish('mine', Uint8Array.of(1));
    while (seen.length === 0) expect(link.receive(1_000_000, 0)).toBe(true);
    const startedMs = performance.now();
    expect(link.receive(20_000, 100)).toBe(false);
    const waitedMs = performance.now() - startedMs;
    expect(waitedMs >= 19 && waitedMs < 1_000, `${waitedMs}`).toBe(true);
    expect(seen.length).toBe(1);
    await link.close();
    await server.stop();
  });

  test('a server that goes away and comes back has its subscriptions again; what was published meanwhile is lost', async () => {
    const first = await startNatsServer();
    const link = await open(first.url, 'native');
    const changes: string[] = [];
    link.onStatus((status) => changes.push(status));
    const seen = collect(link, 'again');
    await link.flush();
    await first.kill();
    await eventually(() => expect(changes).toEqual(['disconnect']));
    await expect(link.flush()).rejects.toMatchObject({ code: 'unavailable' });
    expect(link.receive(10, 5)).toBe(false);
    link.publish('again', Uint8Array.of(1));
    const second = await startNatsServer({ port: first.port });
    await eventually(() => expect(changes).toEqual(['disconnect', 'reconnect']));
    link.publish('again', Uint8Array.of(2));
    await eventually(() => expect(seen.map(([, , data]) => data[0])).toEqual([2]));
    await link.close();
    await second.stop();
  });

  test('a flush that is under way when the server stops answering is not resolved, and closing does not wait for ever', async () => {
    const server = await startNatsServer();
    const link = await open(server.url, 'native');
    process.kill(server.pid!, 'SIGSTOP');
    // Its threads stop one after the other.
    await new Promise((resolve) => setTimeout(resolve, 100));
    let state = 'pending';
    link.flush().then(
      () => (state = 'resolved'),
      () => (state = 'rejected'),
    );
    const startedMs = performance.now();
    expect(await link.close()).toBe(false);
    expect(performance.now() - startedMs).toBeLessThan(4_000);
    await eventually(() => expect(state).toBe('rejected'));
    await server.kill();
  });

  test('users and passwords: from a file, from the address; a wrong one is refused at once', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'lamina-link-'));
    const passwordFile = join(directory, 'password');
    writeFileSync(passwordFile, 's3cret\n');
    const server = await startNatsServer({
      configuration: 'authorization { users: [ { user: "shard", password: "s3cret" } ] }',
    });
    const named = { name: 'test', connectTimeoutMs: 2_000 };
    const byFile = await openTensorLink(
      { ...named, url: server.url, access: { user: 'shard', passwordFile } },
      events,
      'native',
    );
    const byAddress = await open(server.url.replace('//', '//shard:s3cret@'), 'native');
    await Promise.all([byFile.link.flush(), byAddress.flush()]);
    const startedMs = performance.now();
    await expect(openTensorLink({ ...named, url: server.url }, events, 'native')).rejects.toMatchObject({
      code: 'nats_unreachable',
      message: expect.stringContaining('refuses a process without a password'),
    });
    expect(performance.now() - startedMs).toBeLessThan(1_500);
    await expect(
      openTensorLink({ ...named, url: server.url, access: { user: 'shard', passwordFile: directory } }, events),
    ).rejects.toMatchObject({ code: 'config_invalid' });
    await Promise.all([byFile.link.close(), byAddress.close()]);
    await server.stop();
    rmSync(directory, { recursive: true });
  });

  test('no server is nats_unreachable after the time given; TLS is left to nats.js', async () => {
    await expect(open('nats://127.0.0.1:9', 'native', 300)).rejects.toMatchObject({ code: 'nats_unreachable' });
    const options = { url: 'tls://127.0.0.1:9', name: 'test', connectTimeoutMs: 100 };
    await expect(openTensorLink(options, events, 'native')).rejects.toMatchObject({
      code: 'config_invalid',
      message: expect.stringContaining('TLS'),
    });
    await expect(openTensorLink(options, events, 'auto')).rejects.toMatchObject({ code: 'nats_unreachable' });
  });

  test('an address that cannot even be tried is passed over, and nothing comes of it later', async () => {
    const server = await startNatsServer();
    // No route, or no such family: connecting fails at once.
    const link = await open(`nats://[2001:db8::1]:4222,nats://255.255.255.255:4222,${server.url}`, 'native');
    const failures: unknown[] = [];
    const onFailure = (cause: unknown): void => void failures.push(cause);
    process.on('uncaughtException', onFailure);
    await new Promise((resolve) => setTimeout(resolve, 5_500));
    process.off('uncaughtException', onFailure);
    await link.flush();
    expect(failures).toEqual([]);
    await link.close();
    await server.stop();
  }, 15_000);

  test('a worker thread and a process may end with a connection open', async () => {
    const server = await startNatsServer();
    const code = `
      const { workerData } = require('node:worker_threads');
      import(workerData.bus).then(async ({ openTensorLink }) => {
        const { link } = await openTensorLink({ url: workerData.url, name: 't', connectTimeoutMs: 2000 }, { onError() {} }, 'native');
        link.subscribe('x', () => {});
        await link.flush();
        require('node:worker_threads').parentPort.postMessage('open');
        if (workerData.exits) process.exit(0);
      });`;
    for (let i = 0; i < 10; i++) {
      const workerData = { bus: import.meta.resolve('@lamina/bus'), url: server.url, exits: i % 2 === 0 };
      const worker = new Worker(code, { eval: true, workerData });
      const exited = once(worker, 'exit');
      await once(worker, 'message');
      if (i % 2 === 1) void worker.terminate();
      expect(await exited).toEqual([i % 2 === 0 ? 0 : 1]);
    }
    await server.stop();
  });
});

/** Of this process over thousands of connections, each of which has buffers of 64 KiB and more. */
const MAX_GROWTH_BYTES = 32e6;
const GREETING = 'INFO {"max_payload":1048576}\r\n';

/** What says `lines` to everybody who connects, once it was greeted. */
async function pretendServer(
  lines: (socket: Socket) => void,
  greeting = GREETING,
): Promise<{ url: string; server: Server; numJoined: () => number }> {
  let numJoined = 0;
  const server = createServer((socket) => {
    numJoined++;
    socket.on('error', () => undefined);
    socket.write(greeting);
    socket.once('data', () => {
      socket.write('PONG\r\n');
      lines(socket);
    });
  }).listen(0, '127.0.0.1');
  await once(server, 'listening');
  const address: AddressInfo | string | null = server.address();
  const port = typeof address === 'object' && address !== null ? address.port : 0;
  return { url: `nats://127.0.0.1:${port}`, server, numJoined: () => numJoined };
}

describe('native, and a server that does not keep to the protocol', () => {
  test('a message that comes byte by byte is whole when it is handed on', async () => {
    const text = 'MSG a.b 1 5\r\nhello\r\nHMSG c 1 r 12 15\r\nNATS/1.0\r\n\r\nxyz\r\nPING\r\nmsg  d\t1  0\r\n\r\n';
    const { url, server } = await pretendServer((socket) => {
      let at = 0;
      const timer = setInterval(() => {
        if (at < text.length) socket.write(text[at++]!);
        else clearInterval(timer);
      }, 1);
    });
    const link = await open(url, 'native');
    const seen = collect(link, 'anything');
    await eventually(() =>
      expect(seen.map(([subject, reply, data]) => [subject, reply, Buffer.from(data).toString()])).toEqual([
        ['a.b', undefined, 'hello'],
        ['c', 'r', 'xyz'],
        ['d', undefined, ''],
      ]),
    );
    const closing = link.close();
    server.close();
    await closing;
  });

  test('an INFO line before the login is answered leaves flushes one to one with what was published', async () => {
    const answerPings = (socket: Socket): void => {
      socket.on('data', (bytes) => {
        for (const _ of bytes.toString().matchAll(/PING/g)) setTimeout(() => socket.write('PONG\r\n'), 200);
      });
    };
    const { url, server } = await pretendServer(answerPings, GREETING + GREETING);
    const link = await open(url, 'native');
    await new Promise((resolve) => setTimeout(resolve, 20));
    const startedMs = performance.now();
    await link.flush();
    expect(performance.now() - startedMs).toBeGreaterThan(150);
    const closing = link.close();
    server.close();
    await closing;
  });

  const nonsense = [
    ['MSG a 1 99999999999\r\n', 'a size that no number holds'],
    ['MSG a 1 -1\r\n', 'a negative size'],
    ['MSG a 1 200000000\r\n', 'a size above every limit'],
    ['MSG a 1 3\r\nabcde\r\n', 'a payload that is longer than said'],
    ['HMSG a 1 9 4\r\nNATS/1.0\r\n\r\n', 'headers longer than the message'],
    ['MSG a 1 2 3 4 5\r\n', 'too many fields'],
    ['MSG\r\n', 'no fields'],
    ['HELLO\r\n', 'another verb'],
    ['MSG a 1 3\rabc\r\n', 'half of an end of line'],
    ['x'.repeat(70_000), 'a line without an end'],
  ] as const;
  test.each(nonsense)('%#: the connection is made anew, and nothing is handed on', async (text) => {
    const { url, server, numJoined } = await pretendServer((socket) => socket.write(text));
    const link = await open(url, 'native');
    const seen = collect(link, 'a');
    await eventually(() => expect(numJoined()).toBeGreaterThan(1));
    expect(seen).toEqual([]);
    const closing = link.close();
    server.close();
    await closing;
  });

  // How single lines are read, in far more cases: packages/bus/test/server-lines.test.ts.
  const numConnections = IS_LONG ? 20_000 : 200;
  const mutatedTitle = `${numConnections} connections of mutated streams, in any pieces: no crash, no hang, and an honest server is understood afterwards`;
  const mutated = async (): Promise<void> => {
    let state = 7;
    const random = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    const honest =
      'MSG a.b 1 5\r\nhello\r\nHMSG c 2 r 12 15\r\nNATS/1.0\r\n\r\nxyz\r\nPING\r\n+OK\r\nINFO {"max_payload":9}\r\n-ERR \'x\'\r\n';
    const { url, server } = await pretendServer((socket) => {
      // Until one is bad: what comes behind it is not read.
      for (let i = 0; i < 50; i++) {
        const bytes = Buffer.from(honest);
        const numMutations = random(4);
        for (let m = 0; m < numMutations; m++) bytes[random(bytes.length)] = random(256);
        const cut = random(bytes.length);
        socket.write(bytes.subarray(0, cut));
        socket.write(bytes.subarray(cut, random(8) === 0 ? random(bytes.length) : bytes.length));
      }
    });
    const quiet = { onError: () => undefined };
    const startedMs = performance.now();
    let heldBefore = 0;
    for (let i = 0; i < numConnections; i++) {
      // What the first ones leave is there once.
      if (i === numConnections / 10) heldBefore = process.memoryUsage.rss();
      const { link } = await openTensorLink({ url, name: 'test', connectTimeoutMs: 5_000 }, quiet, 'native');
      link.subscribe('a.b', ({ data, subject, reply }) => void [data.length, subject, reply]);
      const ended = new Promise<void>((resolve) => link.onStatus(() => resolve()));
      await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 5))]);
      void link.close();
    }
    const grownBytes = process.memoryUsage.rss() - heldBefore;
    tell(
      `${count(numConnections)} connections in ${secondsSince(startedMs)}; resident memory + ${megabytes(grownBytes)}`,
    );
    expect(grownBytes).toBeLessThan(MAX_GROWTH_BYTES);
    server.close();
    const real = await startNatsServer();
    const link = await open(real.url, 'native');
    const seen = collect(link, 'x');
    link.publish('x', Uint8Array.of(1));
    await eventually(() => expect(seen.length).toBe(1));
    await link.close();
    await real.stop();
  };
  test(mutatedTitle, mutated, IS_LONG ? 600_000 : 60_000);
});

/** The life of a service process, seen from outside: the kv-manager, which needs nothing but a nats-server. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer, type Server, type Socket, connect as tcpConnect } from 'node:net';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import { type NatsServer, startNatsServer } from '../../testkit/src/nats-server.ts';

const MAIN = fileURLToPath(new URL('../../../services/kv-manager/dist/main.js', import.meta.url));

let nats: NatsServer;
const children: ChildProcess[] = [];

beforeAll(async () => {
  nats = await startNatsServer();
});
afterAll(() => nats.stop());
afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
});

interface Process {
  readonly stderr: () => string;
  readonly ended: Promise<{ status: number | null; stdout: string }>;
  signal(name: NodeJS.Signals): void;
  /** Resolves when its log holds `text`. */
  logged(text: string): Promise<void>;
}

function run(argv: string[], environment: Record<string, string> = {}): Process {
  const inherited = Object.entries(process.env).filter(([name]) => !name.startsWith('LAMINA_'));
  const child = spawn(process.execPath, [MAIN, ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...Object.fromEntries(inherited), ...environment },
  });
  children.push(child);
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
  });
  const ended = once(child, 'close').then(([status]) => ({ status: status as number | null, stdout }));
  return {
    stderr: () => stderr,
    ended,
    signal: (name) => child.kill(name),
    logged: (text) =>
      new Promise((resolve, reject) => {
        const look = (): void => {
          if (stderr.includes(text)) resolve();
        };
        child.stderr.on('data', look);
        child.once('close', () => reject(new Error(`ended without "${text}": ${stderr}`)));
        look();
      }),
  };
}

/** What a person sees: the lines that are no JSON log. */
function lines(process: Process): string[] {
  return process
    .stderr()
    .split('\n')
    .filter((line) => line !== '' && !line.startsWith('{'));
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = Object(server.address());
  server.close();
  await once(server, 'close');
  return Number(port);
}

test('starts, says so, and ends with 0 on SIGTERM and on SIGINT', async () => {
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    const service = run(['--nats-url', nats.url]);
    await service.logged('"ready"');
    service.signal(signal);
    expect(await service.ended).toEqual({ status: 0, stdout: '' });
    expect(lines(service)).toEqual([]);
    expect(service.stderr()).toContain('"stopped"');
  }
});

test('a bad setting ends it with 1 and a line for each problem, before it connects', async () => {
  const service = run(['--kv-dtyp', 'f32'], { LAMINA_BLOCK_SIZE_TOKENS: '7', LAMINA_BLOK: '1' });
  expect((await service.ended).status).toBe(1);
  expect(service.stderr().trimEnd().split('\n')).toEqual([
    expect.stringMatching(/^lamina kv-manager: --kv-dtyp: no flag of kv-manager/),
    expect.stringMatching(/^LAMINA_BLOK is no setting/),
    expect.stringMatching(/^--block-size-tokens \/ LAMINA_BLOCK_SIZE_TOKENS: "7" .* \[config_invalid\]$/),
  ]);
});

test('no nats-server ends it with 1 and one line that says what to do, without the password', async () => {
  const port = await freePort();
  const service = run(['--nats-connect-timeout-ms', '0', '--nats-url', `nats://user:secret@127.0.0.1:${port}`]);
  expect((await service.ended).status).toBe(1);
  expect(lines(service)).toEqual([
    `lamina kv-manager: no nats-server answers at nats://***@127.0.0.1:${port} (CONNECTION_REFUSED); ` +
      'start one with "nats-server -js" or set LAMINA_NATS_URL [nats_unreachable]',
  ]);
  expect(service.stderr()).not.toContain('secret');
});

test('a service that refuses its configuration ends with 1 and one line', async () => {
  const flags = ['--heartbeat-interval-ms', '1000', '--heartbeat-timeout-ms', '1500'];
  const service = run(['--nats-url', nats.url, ...flags]);
  expect((await service.ended).status).toBe(1);
  expect(lines(service)).toEqual([expect.stringMatching(/^lamina kv-manager: .* \[config_invalid\]$/)]);
});

/** A server that takes connections and says nothing; `met` resolves when a client has come. */
async function muteServer(): Promise<{ port: number; met: Promise<unknown>; close: () => Promise<unknown> }> {
  const sockets: Socket[] = [];
  const server = createServer((socket) => sockets.push(socket.on('error', () => {})));
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    port: Number(Object(server.address()).port),
    met: once(server, 'connection'),
    close: () => {
      for (const socket of sockets) socket.resetAndDestroy();
      server.close();
      return once(server, 'close');
    },
  };
}

test('waits for a nats-server that is not there yet', async () => {
  const mute = await muteServer();
  const service = run(['--nats-url', `nats://127.0.0.1:${mute.port}`, '--nats-connect-timeout-ms', '60000']);
  await mute.met;
  await mute.close();
  const late = await startNatsServer({ port: mute.port });
  await service.logged('"ready"');
  service.signal('SIGTERM');
  expect((await service.ended).status).toBe(0);
  await late.stop();
});

test('a signal ends the waiting for nats-server', async () => {
  const mute = await muteServer();
  const service = run(['--nats-url', `nats://127.0.0.1:${mute.port}`, '--nats-connect-timeout-ms', '60000']);
  await mute.met;
  service.signal('SIGTERM');
  // Otherwise it would try for a minute, which is longer than this test may take.
  expect((await service.ended).status).toBe(0);
  await mute.close();
});

/** A way to the server that can be made to swallow everything: the connection then stays up and never drains. */
class Tunnel {
  readonly #server: Server;
  readonly #sockets: Socket[] = [];

  constructor(server: Server) {
    this.#server = server;
  }

  static async to(port: number): Promise<Tunnel> {
    const server = createServer();
    const tunnel = new Tunnel(server);
    server.on('connection', (socket) => {
      const upstream = tcpConnect(port, '127.0.0.1');
      socket.pipe(upstream).pipe(socket);
      for (const end of [socket, upstream]) end.on('error', () => end.destroy());
      tunnel.#sockets.push(socket, upstream);
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    return tunnel;
  }

  get url(): string {
    return `nats://127.0.0.1:${Object(this.#server.address()).port}`;
  }

  swallow(): void {
    for (const socket of this.#sockets) socket.unpipe().pause();
  }

  close(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
  }
}

test('while it stops, a second signal ends it at once with 130; without one it gives up waiting and ends with 0', async () => {
  const tunnel = await Tunnel.to(nats.port);
  const impatient = run(['--nats-url', tunnel.url]);
  const patient = run(['--nats-url', tunnel.url]);
  await Promise.all([impatient.logged('"ready"'), patient.logged('"ready"')]);
  tunnel.swallow();
  impatient.signal('SIGTERM');
  patient.signal('SIGTERM');
  // Another signal: two of a kind that come together are one.
  impatient.signal('SIGINT');
  expect((await impatient.ended).status).toBe(130);
  expect(impatient.stderr()).not.toContain('"stopped"');
  expect((await patient.ended).status).toBe(0);
  expect(patient.stderr()).toContain('connection did not drain');
  tunnel.close();
});

/**
 * Owns the proof that docker-compose.yml works for real: images, containers, a prompt from the host, the same tokens as
 * the uncut graph on this machine, 1 -> 4 attention shards while it runs, a clean stop, and the same over TLS.
 */
import { execFileSync } from 'node:child_process';
import { chmod, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildModel, loadTokenizer } from '@lamina/model';
import { UncutReference } from '@lamina/testkit';
import { connect, createInbox, type NatsConnection } from 'nats';
import { afterAll, beforeAll, describe, expect, it, onTestFailed } from 'vitest';
import { ComposeProject, REPO_ROOT, reasonToSkip } from './compose.ts';

const MODEL_DIR = join(REPO_ROOT, 'models/lamina-tiny');
const PROMPT = 'Once upon a time, there was a little girl named Lily.';
const SHORT_TOKENS = 48;
const LONG_TOKENS = 240;
/** stop_grace_period of docker-compose.yml, and what Docker itself needs. */
const STOP_TIMEOUT_MS = 30_000;

const skipReason = await reasonToSkip();
if (skipReason !== null) {
  if (process.env.LAMINA_E2E_REQUIRED === '1') throw new Error(`the compose test must run here, but ${skipReason}`);
  console.warn(`compose test skipped: ${skipReason}`);
}

interface TokenReply {
  index: number;
  token: number | null;
  finish_reason: string | null;
  error?: { code: string; message: string };
}

/** What the uncut graph answers on this machine. */
async function expectedTokens(maxTokens: number): Promise<number[]> {
  const cacheDir = await mkdtemp(join(tmpdir(), 'lamina-e2e-'));
  try {
    const reference = await UncutReference.load(await buildModel(MODEL_DIR, { cacheDir }));
    const tokenizer = await loadTokenizer(MODEL_DIR);
    const { tokenIds } = await reference.greedy(tokenizer.encode(PROMPT), maxTokens, { ignoreEos: true });
    return tokenIds;
  } finally {
    await rm(cacheDir, { recursive: true, force: true });
  }
}

/** One prompt as any NATS client sends it: a request on the public subject, replies until the header says the last. */
async function generate(nats: NatsConnection, maxTokens: number): Promise<number[]> {
  const inbox = createInbox();
  const replies = nats.subscribe(inbox);
  const body = { prompt: PROMPT, max_tokens: maxTokens, temperature: 0, ignore_eos: true };
  nats.publish('lamina.v1.generate', JSON.stringify(body), { reply: inbox });
  const timer = setTimeout(() => replies.unsubscribe(), 120_000);
  const tokens: number[] = [];
  try {
    for await (const reply of replies) {
      if (reply.headers?.code === 503) throw new Error('no gateway listens on lamina.v1.generate');
      const parsed = reply.json<TokenReply | TokenReply[]>();
      for (const message of Array.isArray(parsed) ? parsed : [parsed]) {
        if (message.error !== undefined) throw new Error(`${message.error.code}: ${message.error.message}`);
        if (message.token === null) continue;
        expect(message.index).toBe(tokens.length);
        tokens.push(message.token);
      }
      if (reply.headers?.get('Lamina-Final') === 'true') return tokens;
    }
    throw new Error(`no final reply within 120 s; ${tokens.length} tokens came`);
  } finally {
    clearTimeout(timer);
    replies.unsubscribe();
  }
}

/** Every reply to a request that all instances of a service answer. */
async function askAll<T>(nats: NatsConnection, subject: string): Promise<T[]> {
  const replies = await nats.requestMany(subject, '', { maxWait: 1_000 });
  const answers: T[] = [];
  for await (const reply of replies) answers.push(reply.json<T>());
  return answers;
}

interface ShardStats {
  id: string;
  data?: { blocksUsedPeak?: number };
  endpoints?: { data?: { blocksUsedPeak?: number } }[];
}

/** Most blocks that each shard has held so far. */
async function blocksUsedPeaks(nats: NatsConnection): Promise<number[]> {
  const stats = await askAll<ShardStats>(nats, '$SRV.STATS.lamina-attention-shard');
  return stats.map((shard) => {
    const endpointPeaks = (shard.endpoints ?? []).map((endpoint) => endpoint.data?.blocksUsedPeak ?? 0);
    return Math.max(shard.data?.blocksUsedPeak ?? 0, ...endpointPeaks);
  });
}

describe.skipIf(skipReason !== null)('docker-compose', () => {
  let project: ComposeProject;
  let nats: NatsConnection;
  let certificates: string;
  let expectedShort: readonly number[];
  let expectedLong: readonly number[];

  beforeAll(async () => {
    certificates = await mkdtemp(join(tmpdir(), 'lamina-e2e-certificates-'));
    project = await ComposeProject.create({
      LAMINA_CERTIFICATES_DIR: certificates,
      LAMINA_KV_DTYPE: 'f32',
      LAMINA_KV_BUDGET_BYTES: '64m',
      LAMINA_SPREAD_ABOVE_TOKENS: '32',
    });
    const startMs = Date.now();
    await project.build();
    console.info(`images built in ${((Date.now() - startMs) / 1000).toFixed(1)} s`);
    expectedLong = await expectedTokens(LONG_TOKENS);
    expectedShort = expectedLong.slice(0, SHORT_TOKENS);
  });

  afterAll(async () => {
    await nats?.close();
    await project?.remove();
    await rm(certificates, { recursive: true, force: true });
  });

  const showLogsOnFailure = () => onTestFailed(async () => console.error(await project.logs()));

  it('starts, and is ready when /health answers 200', async () => {
    showLogsOnFailure();
    const startMs = Date.now();
    await project.up(1);
    await project.ready(120_000);
    console.info(`ready ${((Date.now() - startMs) / 1000).toFixed(1)} s after docker-compose up`);
    nats = await connect({ servers: project.natsUrl });
  });

  it('runs every service without root and with a read-only root file system', async () => {
    for (const container of await project.containers()) {
      // It has made the passwords, and ended.
      const status = container.service === 'credentials' ? 'exited' : 'running';
      expect(container).toMatchObject({ status, exitCode: 0, user: '10001:10001', readOnly: true });
    }
  });

  it('lets a client from the host be a client and nothing else', async () => {
    showLogsOnFailure();
    await expect(nats.request('lamina.v1.kv.status', '', { timeout: 5_000 })).rejects.toMatchObject({
      code: 'PERMISSIONS_VIOLATION',
    });
    await expect(connect({ servers: project.natsUrl, user: 'attention-shard', pass: 'x' })).rejects.toMatchObject({
      code: 'AUTHORIZATION_VIOLATION',
    });
  });

  it('answers a prompt from the host with the tokens of the uncut graph', async () => {
    showLogsOnFailure();
    expect(await generate(nats, SHORT_TOKENS)).toEqual(expectedShort);
  });

  it('scales from 1 to 4 attention shards while it runs; a long answer uses several and stays the same', async () => {
    showLogsOnFailure();
    const before = (await project.containers()).length;
    await project.up(4);
    expect((await project.containers()).length).toBe(before + 3);
    await expect
      .poll(async () => (await askAll(nats, '$SRV.PING.lamina-attention-shard')).length, { timeout: 60_000 })
      .toBe(4);
    // New shards count once the kv-manager has heard of them.
    await expect
      .poll(
        async () => {
          expect(await generate(nats, LONG_TOKENS)).toEqual(expectedLong);
          return (await blocksUsedPeaks(nats)).filter((peak) => peak > 0).length;
        },
        { timeout: 120_000, interval: 1_000 },
      )
      .toBeGreaterThan(1);
  });

  it('keeps every answer its own when several prompts come at once', async () => {
    showLogsOnFailure();
    const answers = await Promise.all(Array.from({ length: 8 }, () => generate(nats, SHORT_TOKENS)));
    for (const answer of answers) expect(answer).toEqual(expectedShort);
  });

  it('stops within the grace time, every process by itself', async () => {
    await nats.close();
    const startMs = Date.now();
    await project.compose('stop');
    expect(Date.now() - startMs).toBeLessThan(STOP_TIMEOUT_MS);
    for (const container of await project.containers()) {
      expect(container.status).toBe('exited');
      expect([0, 143], `${container.service} ended with ${container.exitCode}`).toContain(container.exitCode);
    }
  });

  it('answers over TLS with deploy/compose.tls.yml, and speaks to nobody without it', async () => {
    showLogsOnFailure();
    const startMs = Date.now();
    execFileSync(join(REPO_ROOT, 'deploy/make-certificates.sh'), [certificates]);
    // The server of the container is another user than ours; this key is for this test.
    await chmod(join(certificates, 'server-key.pem'), 0o644);
    await project.compose('down', '--timeout', '5');
    project.overlay('deploy/compose.tls.yml');
    await project.up(1);
    await project.ready(120_000);
    nats = await connect({ servers: project.natsUrl, tls: { caFile: join(certificates, 'ca.pem') } });
    expect(nats.info?.tls_required).toBe(true);
    expect(await generate(nats, SHORT_TOKENS)).toEqual(expectedShort);
    await expect(connect({ servers: project.natsUrl, reconnect: false })).rejects.toThrow(/certificate/i);
    console.info(`over TLS after ${((Date.now() - startMs) / 1000).toFixed(1)} s`);
  });
});

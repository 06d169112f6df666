/** Pulling models from a hub that speaks the real one's HTTP API on loopback, with its redirects, pages and failures. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildModel, type PullProgress, pullModel, readModel, resolveModel } from '@lamina/model';
import { writeGenaiExport } from '@lamina/testkit';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { startTestCluster } from '../cluster.ts';
import { HubServer, sha } from './hub-server.ts';

const TINY = fileURLToPath(new URL('../../models/lamina-tiny', import.meta.url));
const REPO = 'lamina/tiny';
const tinyFiles = Object.fromEntries(readdirSync(TINY).map((name) => [name, readFileSync(join(TINY, name))]));
const weights = tinyFiles['model.safetensors']!;
const small = (text: string): Uint8Array => Buffer.from(text);

let hub: HubServer;
let cacheDir: string;

beforeAll(async () => {
  hub = await HubServer.start();
});

afterAll(() => hub.stop());

beforeEach(() => {
  cacheDir = mkdtempSync(join(tmpdir(), 'lamina-hub-'));
  Object.assign(hub.faults, { cuts: [], damaged: undefined, busy: 0, ignoresRanges: false });
  hub.repos.clear();
  hub.repos.set(REPO, {
    files: { ...tinyFiles, 'pytorch_model.bin': Buffer.alloc(9000), 'training.log': 'x', '.gitattributes': '' },
  });
  hub.takeSeen();
});

afterEach(() => rmSync(cacheDir, { recursive: true, force: true }));

const access = (more: object = {}) => ({ endpoint: hub.endpoint, cacheDir, ...more });
const names = (dir: string): string[] => readdirSync(dir, { recursive: true, encoding: 'utf8' }).sort();

describe('pulling', () => {
  it('brings what the model needs and nothing else, byte for byte, and is usable', async () => {
    const pulled = await pullModel(REPO, access());
    expect(names(pulled.dir)).toEqual([
      'config.json',
      'generation_config.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    expect(sha('sha256', readFileSync(join(pulled.dir, 'model.safetensors')))).toBe(sha('sha256', weights));
    expect(pulled).toMatchObject({ commit: hub.commitOf(REPO), variant: 'safetensors', isCached: false, files: 5 });
    expect((await readModel(pulled.dir)).modelId).toBe('tiny');
    expect(names(join(cacheDir, 'hub')).filter((name) => /partial|lock/.test(name))).toEqual([]);
  });

  it('asks for no file twice, and takes a revision that moved', async () => {
    const first = await pullModel(REPO, access());
    hub.takeSeen();
    expect(await pullModel(REPO, access())).toMatchObject({ dir: first.dir, isCached: true });
    expect(hub.takeSeen()).toEqual([]);
    hub.repos.set(REPO, { files: { ...tinyFiles, 'generation_config.json': '{}' } });
    const second = await pullModel(REPO, access());
    expect(second.dir).not.toBe(first.dir);
    expect(await pullModel(`${REPO}@${second.commit}`, access())).toMatchObject({ isCached: true });
  });

  it('continues after a connection that was cut, from the byte where it was cut', async () => {
    hub.faults.cuts = [1_000_000, 700_000];
    const progress: PullProgress[] = [];
    await pullModel(REPO, access({ onProgress: (each: PullProgress) => progress.push(each) }));
    const ranges = hub
      .takeSeen()
      .filter(({ origin }) => origin === 'cdn')
      .map(({ range }) => range);
    expect(ranges[0]).toBeUndefined();
    expect(ranges.slice(1).map((range) => Number(/^bytes=(\d+)-$/.exec(range ?? '')?.[1]))).toEqual([
      1_000_000, 1_700_000,
    ]);
    expect(progress.at(-1)).toMatchObject({ doneBytes: progress.at(-1)?.totalBytes, resumedBytes: 0 });
    expect(progress.every((each, i) => each.doneBytes >= (progress[i - 1]?.doneBytes ?? 0))).toBe(true);
  });

  it('continues what an earlier run left', async () => {
    const { dir, commit } = await pullModel(REPO, access());
    rmSync(dir, { recursive: true });
    mkdirSync(`${dir}.partial`);
    writeFileSync(join(`${dir}.partial`, 'model.safetensors.partial'), weights.subarray(0, 2_000_000));
    hub.takeSeen();
    const progress: PullProgress[] = [];
    await pullModel(`${REPO}@${commit}`, access({ onProgress: (each: PullProgress) => progress.push(each) }));
    expect(hub.takeSeen().find(({ origin }) => origin === 'cdn')?.range).toBe('bytes=2000000-');
    expect(progress[0]?.resumedBytes).toBe(2_000_000);
    expect(readFileSync(join(dir, 'model.safetensors')).equals(weights)).toBe(true);
  });

  it('continues at once after a process that was killed while it pulled', async () => {
    const script = `import { pullModel } from '@lamina/model';
      await pullModel('${REPO}', { endpoint: '${hub.endpoint}', cacheDir: ${JSON.stringify(cacheDir)},
        onProgress: ({ doneBytes }) => doneBytes > 1_500_000 && process.kill(process.pid, 'SIGKILL') });`;
    const killed = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: 'inherit' });
    expect(await once(killed, 'exit')).toEqual([null, 'SIGKILL']);
    hub.takeSeen();
    const startedAtMs = performance.now();
    await pullModel(REPO, access());
    expect(performance.now() - startedAtMs).toBeLessThan(5_000);
    expect(Number(/\d+/.exec(hub.takeSeen().find(({ origin }) => origin === 'cdn')?.range ?? '')?.[0])).toBeGreaterThan(
      1_000_000,
    );
  });

  it('begins anew where what was there is wrong, or the server knows no ranges', async () => {
    const { dir } = await pullModel(REPO, access());
    for (const ignoresRanges of [false, true]) {
      rmSync(dir, { recursive: true });
      mkdirSync(`${dir}.partial`);
      writeFileSync(join(`${dir}.partial`, 'model.safetensors.partial'), Buffer.alloc(50_000, 7));
      hub.faults.ignoresRanges = ignoresRanges;
      await pullModel(REPO, access());
      expect(readFileSync(join(dir, 'model.safetensors')).equals(weights)).toBe(true);
    }
  });

  it('waits for a hub that is busy', async () => {
    hub.faults.busy = 2;
    await pullModel(REPO, access());
  });

  it('refuses a damaged file and keeps nothing of it', async () => {
    hub.faults.damaged = Buffer.alloc(weights.length, 1);
    await expect(pullModel(REPO, access())).rejects.toMatchObject({
      code: 'model_invalid',
      message: /model.safetensors arrived damaged/,
    });
    expect(
      names(cacheDir).filter((name) => name.includes('safetensors') && !name.endsWith('safetensors')),
    ).not.toContainEqual(expect.stringContaining('model.safetensors'));
    await pullModel(REPO, access());
  });

  it('is done once when two do it at a time', async () => {
    let waits = 0;
    const pulls = [0, 1].map(() => pullModel(REPO, access({ onWait: () => waits++ })));
    const [first, second] = await Promise.all(pulls);
    expect(first?.dir).toBe(second?.dir);
    expect([first?.isCached, second?.isCached].sort()).toEqual([false, true]);
    expect(waits).toBe(1);
    expect(hub.takeSeen().filter(({ origin }) => origin === 'cdn')).toHaveLength(1);
  });
});

describe('which weights', () => {
  const onnx = {
    'config.json': '{}',
    'tokenizer.json': '{}',
    'onnx/model.onnx': small('fp32'),
    'onnx/model.onnx_data': Buffer.alloc(70_000, 1),
    'onnx/model_q4f16.onnx': small('q4f16'),
    'onnx/model_q4f16.onnx_data': Buffer.alloc(70_000, 2),
    'onnx/model_q4f16.onnx_data_1': Buffer.alloc(70_000, 3),
  };

  it('takes an ONNX variant with all of its external data, and remembers the choice', async () => {
    hub.repos.set(REPO, { files: onnx });
    const { dir } = await pullModel(REPO, access({ weights: 'q4f16' }));
    expect(names(join(dir, 'onnx'))).toEqual(['model_q4f16.onnx', 'model_q4f16.onnx_data', 'model_q4f16.onnx_data_1']);
    hub.takeSeen();
    expect(await resolveModel(REPO, access())).toBe(dir);
    expect(await resolveModel(REPO, access({ textOnly: true }))).toBe(dir);
    expect(hub.takeSeen()).toEqual([]);
    expect((await pullModel(REPO, access())).variant).toBe('fp32');
  });

  it('takes sharded safetensors by their index', async () => {
    const files = {
      'config.json': '{}',
      'model.safetensors.index.json': '{}',
      'model-00001-of-00002.safetensors': small('1'),
      'model-00002-of-00002.safetensors': small('2'),
      'consolidated.safetensors': small('3'),
    };
    hub.repos.set(REPO, { files });
    const { dir } = await pullModel(REPO, access());
    expect(names(dir)).toEqual(
      Object.keys(files)
        .filter((name) => name !== 'consolidated.safetensors')
        .sort(),
    );
  });

  it('leaves the weights to the executor where only the text is wanted', async () => {
    const text = await resolveModel(REPO, access({ textOnly: true }));
    expect(existsSync(join(text, 'tokenizer.json'))).toBe(true);
    expect(existsSync(join(text, 'model.safetensors'))).toBe(false);
    const all = await resolveModel(REPO, access());
    expect(existsSync(join(all, 'model.safetensors'))).toBe(true);
    expect((await readModel(text)).modelId).toBe((await readModel(all)).modelId);
  });

  it.each([
    ['a variant that is not there', 'q8', onnx, /has no weights 'q8'; give --weights one of: fp32, q4f16/],
    ['pickles', undefined, { 'config.json': '{}', 'pytorch_model.bin': 'x' }, /pickled weights only/],
    ['no model', undefined, { 'README.md': 'x' }, /has no config.json/],
    ['a path that leaves the directory', undefined, { 'config.json': '{}', '../../outside': 'x' }, /names a file/],
  ])('refuses %s', async (_, asked, files, message) => {
    hub.repos.set(REPO, { files });
    await expect(pullModel(REPO, access({ weights: asked }))).rejects.toMatchObject({ code: 'model_invalid', message });
  });
});

describe('folders of onnxruntime-genai', () => {
  const CPU = 'cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4';
  const CUDA = 'cuda/cuda-int4-rtn-block-32';
  const GRAPH = 'phi3-mini-cpu-int4.onnx';
  let exported: Record<string, Uint8Array>;
  /** The files of an export as the model builder lays them out in one folder. */
  const inFolder = (folder: string): Record<string, Uint8Array | string> =>
    Object.fromEntries(Object.entries(exported).map(([name, bytes]) => [`${folder}/${name}`, bytes]));
  const foreign = (folder: string) => ({
    [`${folder}/genai_config.json`]: '{}',
    [`${folder}/model.onnx`]: small(folder),
    [`${folder}/model.onnx.data`]: Buffer.alloc(70_000, 5),
  });
  const pulled = [
    'genai_config.json',
    'phi3-mini-cpu-int4.onnx',
    'phi3-mini-cpu-int4.onnx.data',
    'tokenizer.json',
    'tokenizer_config.json',
  ];

  beforeAll(async () => {
    const dir = mkdtempSync(join(tmpdir(), 'lamina-genai-'));
    await writeGenaiExport(dir, { operator: 'gqa', packed: true }, { precision: 'q4', fileName: GRAPH });
    exported = Object.fromEntries(readdirSync(dir).map((name) => [name, readFileSync(join(dir, name))]));
    rmSync(dir, { recursive: true });
    expect(Object.keys(exported).sort()).toEqual(pulled);
  });

  it('takes the only one for CPUs, of it all that is needed and nothing else, and the result loads', async () => {
    const files = {
      'README.md': 'x',
      'config.json': '{}',
      ...foreign(CUDA),
      ...inFolder(CPU),
      [`${CPU}/configuration_phi3.py`]: 'import os',
      [`${CPU}/deeper/model.onnx`]: 'x',
    };
    hub.repos.set(REPO, { files });
    const { dir, variant } = await pullModel(REPO, access());
    expect(variant).toBe(`genai/${CPU}`);
    // config.json is at the top, for all of them.
    expect(names(dir)).toEqual(['config.json', ...pulled]);
    const model = await readModel(dir);
    expect(model).toMatchObject({ modelId: 'tiny', contextLength: 256, vocabSize: 264, eosTokenIds: [256, 7] });
    const built = await buildModel(dir, { cacheDir: join(cacheDir, 'built') });
    expect(built).toMatchObject({ uncutKind: 'published', uncutGraphPath: join(dir, GRAPH) });
    hub.takeSeen();
    expect(await resolveModel(REPO, access())).toBe(dir);
    expect(await resolveModel(`${REPO}:${CPU}`, access())).toBe(dir);
    expect(hub.takeSeen()).toEqual([]);
  });

  it('takes the folder that the name says, beside another', async () => {
    const other = 'cpu_and_mobile/cpu-int4-awq-block-128';
    hub.repos.set(REPO, { files: { ...inFolder(CPU), ...inFolder(other), ...foreign(CUDA) } });
    await expect(pullModel(REPO, access())).rejects.toMatchObject({
      code: 'model_invalid',
      message:
        /models in 3 folders, 2 of them for CPUs by name; name one, as in lamina\/tiny:cpu_and_mobile\/\S+ \(it has: cpu_and_mobile\/cpu-int4-rtn-block-32-acc-level-4, cpu_and_mobile\/cpu-int4-awq-block-128, cuda\/cuda-int4-rtn-block-32\)/,
    });
    expect(names(cacheDir)).toEqual([]);
    const first = await pullModel(`${REPO}:${CPU}`, access());
    const second = await pullModel(`${REPO}@main:${other}/`, access());
    expect(second.dir).not.toBe(first.dir);
    expect((await readModel(second.dir)).modelId).toBe('tiny');
    expect(await resolveModel(REPO, access())).toBe(second.dir);
    expect(await resolveModel(`${REPO}:${CPU}`, access())).toBe(first.dir);
  });

  it('takes the only folder whatever it is for, and a model at the top', async () => {
    hub.repos.set(REPO, { files: inFolder('gpu') });
    expect((await pullModel(REPO, access())).variant).toBe('genai/gpu');
    hub.repos.set(REPO, { files: { ...exported, ...foreign(CPU) } });
    const top = await pullModel(REPO, access());
    expect(names(top.dir)).toEqual(pulled);
  });

  it('is a folder of safetensors or of transformers.js only where that is named', async () => {
    hub.repos.set(REPO, { files: { ...tinyFiles, ...inFolder(CPU) } });
    expect((await pullModel(REPO, access())).variant).toBe('safetensors');
    expect((await pullModel(`${REPO}:${CPU}`, access())).variant).toBe(`genai/${CPU}`);
  });

  it.each([
    [
      'a folder that is not there',
      `${REPO}:cpu`,
      undefined,
      /has no folder 'cpu' with a genai_config.json.*it has: cuda/,
    ],
    ['weights of it', REPO, 'q4', /has no weights 'q4', but a model in each of its folders; name one, as in .*:cuda/],
    ['a folder and weights', `${REPO}:${CUDA}`, 'q4', /leave --weights out/],
    ['a folder outside', `${REPO}:../${CUDA}`, undefined, /names no repository/],
    ['a folder without a graph', `${REPO}:empty`, undefined, /no \*\.onnx in its folder 'empty'/],
  ])('refuses %s', async (_, name, asked, message) => {
    hub.repos.set(REPO, { files: { ...foreign(CUDA), 'empty/genai_config.json': '{}' } });
    await expect(pullModel(name, access({ weights: asked }))).rejects.toThrow(message);
  });

  it('is served by a cluster that is given its name', async () => {
    hub.repos.set(REPO, { files: { ...inFolder(CPU), ...foreign(CUDA) } });
    const cluster = await startTestCluster({
      model: `${REPO}:${CPU}`,
      attentionShards: 1,
      settings: { cacheDir },
      environment: { HF_ENDPOINT: hub.endpoint, HF_TOKEN: '' },
    });
    try {
      const request = { model: 'tiny', prompt: 'Once', max_tokens: 3, temperature: 0, ignore_eos: true };
      expect((await cluster.generate(request)).at(-1)).toMatchObject({ finish_reason: 'length' });
    } finally {
      await cluster.stop();
    }
  }, 60_000);
});

describe('refusals say what to do', () => {
  it('gives the token to the hub and to nobody else', async () => {
    hub.repos.set(REPO, { files: tinyFiles, token: 'hf_secret' });
    await expect(pullModel(REPO, access())).rejects.toThrow(/private, or does not exist \(401\).*set HF_TOKEN/);
    await expect(pullModel(REPO, access({ token: 'hf_wrong' }))).rejects.toThrow(
      /the token in HF_TOKEN does not open it/,
    );
    hub.takeSeen();
    await pullModel(REPO, access({ token: 'hf_secret' }));
    const seen = hub.takeSeen();
    expect(
      seen.filter(({ origin }) => origin === 'hub').every(({ authorization }) => authorization === 'Bearer hf_secret'),
    ).toBe(true);
    expect(seen.filter(({ origin }) => origin === 'cdn').map(({ authorization }) => authorization)).toEqual([
      undefined,
    ]);
  });

  it.each([
    ['lamina/none', /no repository lamina\/none/],
    [`${REPO}@v9`, /lamina\/tiny has no revision "v9"/],
    ['none', /names no repository/],
    ['models/lamina-tiny', /names no repository/],
  ])('%s', async (name, message) => {
    await expect(pullModel(name, access({ token: 'hf_any' }))).rejects.toThrow(message);
  });

  it('a gated repository', async () => {
    hub.repos.set(REPO, { files: tinyFiles, isGated: true });
    await expect(pullModel(REPO, access())).rejects.toThrow(/gated.*accept its terms/);
  });

  it('no network, and no hub', async () => {
    const closed = 'http://127.0.0.1:9';
    await expect(pullModel(REPO, { endpoint: closed, cacheDir })).rejects.toMatchObject({
      code: 'unavailable',
      message: /no connection to http:\/\/127.0.0.1:9 .*HF_ENDPOINT/,
    });
    await expect(resolveModel('lamina/tinny', { endpoint: closed, cacheDir })).rejects.toThrow(
      /is no directory here and not in the cache/,
    );
    await expect(pullModel(REPO, { endpoint: 'nowhere', cacheDir })).rejects.toThrow(/HF_ENDPOINT/);
  });

  it('a directory is a directory, whatever the hub has', async () => {
    expect(await resolveModel(TINY, access())).toBe(TINY);
    expect(await resolveModel('models/lamina-tiny', access())).toBe(join(process.cwd(), 'models/lamina-tiny'));
    expect(await resolveModel('./missing', access())).toBe(join(process.cwd(), 'missing'));
    expect(hub.takeSeen()).toEqual([]);
  });
});

describe('a cluster', () => {
  it('serves a repository: one pull for all of its processes, none when it is cached', async () => {
    const settings = { cacheDir };
    const environment = { HF_ENDPOINT: hub.endpoint, HF_TOKEN: '' };
    for (const pulls of [1, 0]) {
      hub.takeSeen();
      const cluster = await startTestCluster({ model: REPO, attentionShards: 1, settings, environment });
      try {
        const answer = await cluster.generate({
          model: 'tiny',
          prompt: 'Once upon a time',
          max_tokens: 3,
          temperature: 0,
        });
        expect(answer.at(-1)).toMatchObject({ finish_reason: 'length' });
      } finally {
        await cluster.stop();
      }
      expect(hub.takeSeen().filter(({ origin }) => origin === 'cdn')).toHaveLength(pulls);
    }
  }, 60_000);
});

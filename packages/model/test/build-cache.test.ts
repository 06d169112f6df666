/** The build cache: what is built once, taken up, waited for or built again. All on copies of lamina-tiny. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  cp,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  symlink,
  truncate,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LaminaError } from '@lamina/tensor';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { buildOnce } from '../src/build-cache.ts';
import { buildModel } from '../src/build-model.ts';
import { checkFreeSpace } from '../src/disk-space.ts';
import { WEIGHT_FORMATS, type WeightFormat } from '../src/weight-storage.ts';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const TINY = join(ROOT, 'models/lamina-tiny');

let scratch = '';
let dir = '';
let cacheDir = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-cache-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});
beforeEach(async () => {
  const own = await mkdtemp(join(scratch, 'test-'));
  dir = join(own, 'lamina-tiny');
  cacheDir = join(own, 'cache');
  await cp(TINY, dir, { recursive: true });
});

async function editJson(name: string, fields: Record<string, unknown>): Promise<void> {
  const value: Record<string, unknown> = JSON.parse(await readFile(join(dir, name), 'utf8'));
  await writeFile(join(dir, name), JSON.stringify({ ...value, ...fields }));
}

/** Builds in a process of its own that kills itself when half of the bytes are done. */
async function buildAndDie(): Promise<void> {
  const script = `
    import { buildModel } from '@lamina/model';
    await buildModel(${JSON.stringify(dir)}, {
      cacheDir: ${JSON.stringify(cacheDir)},
      onProgress: (done, total) => { if (done > total / 2) process.kill(process.pid, 'SIGKILL'); },
    });
  `;
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], { cwd: ROOT, stdio: 'inherit' });
  const [, signal] = await once(child, 'exit');
  expect(signal).toBe('SIGKILL');
}

async function partialBuild(): Promise<string> {
  const [name, ...others] = await readdir(cacheDir);
  expect(others).toEqual([]);
  expect(name).toMatch(/\.partial$/);
  return join(cacheDir, name ?? '');
}

describe('a build', () => {
  it('is made once and reused', async () => {
    const progress: number[] = [];
    const onProgress = (done: number, total: number): unknown => progress.push(done / total);
    const first = await buildModel(dir, { cacheDir, onProgress });
    expect(progress).toEqual([...progress].sort((a, b) => a - b));
    expect(progress.length).toBeGreaterThan(10);
    expect(progress.at(-1)).toBe(1);
    const before = await stat(first.stagedGraphPath);
    progress.length = 0;
    const second = await buildModel(dir, { cacheDir, onProgress });
    expect(second).toEqual(first);
    expect(progress).toEqual([1]);
    expect((await stat(second.stagedGraphPath)).ino).toBe(before.ino);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('is made again when a weight or the configuration changes, not when sampling defaults do', async () => {
    const first = await buildModel(dir, { cacheDir });
    await editJson('generation_config.json', { temperature: 0.1 });
    expect((await buildModel(dir, { cacheDir })).stagedGraphPath).toBe(first.stagedGraphPath);
    await editJson('config.json', { rms_norm_eps: 1e-6 });
    const second = await buildModel(dir, { cacheDir });
    const handle = await open(join(dir, 'model.safetensors'), 'r+');
    await handle.write(Uint8Array.of(1), 0, 1, 1_500_000);
    await handle.close();
    const third = await buildModel(dir, { cacheDir });
    expect(new Set([first, second, third].map(({ stagedGraphPath }) => stagedGraphPath)).size).toBe(3);
  });

  it('is another one for every weight format', async () => {
    const built = await Promise.all(WEIGHT_FORMATS.map((weights) => buildModel(dir, { cacheDir, weights })));
    expect(new Set(built.map(({ stagedGraphPath }) => stagedGraphPath)).size).toBe(WEIGHT_FORMATS.length);
    const bytes = (format: WeightFormat): number => built[WEIGHT_FORMATS.indexOf(format)]?.weightBytes ?? 0;
    // Norms and rotary tables are float32 in all of them.
    const plain = bytes('checkpoint');
    const whole = bytes('f32') - plain;
    const ratio = (format: WeightFormat): number => (bytes(format) - plain) / whole;
    expect(ratio('f16')).toBeCloseTo(1 / 2, 1);
    expect(ratio('int8')).toBeCloseTo(9 / 32, 1);
    expect(ratio('int4')).toBeCloseTo(4.5 / 32, 1);
  });

  it('is made once by several at a time', async () => {
    const built = await Promise.all(Array.from({ length: 4 }, () => buildModel(dir, { cacheDir })));
    expect(new Set(built.map(({ stagedGraphPath }) => stagedGraphPath)).size).toBe(1);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('is made again when it was damaged', async () => {
    const first = await buildModel(dir, { cacheDir });
    await truncate(first.stagedGraphPath, 10);
    const second = await buildModel(dir, { cacheDir });
    expect(second.stagedGraphPath).toBe(first.stagedGraphPath);
    expect((await stat(second.stagedGraphPath)).size).toBeGreaterThan(1000);
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('names the cache directory when it cannot be written', async () => {
    const error: unknown = await buildModel(dir, { cacheDir: join(dir, 'config.json') }).catch((reason) => reason);
    expect(error).toMatchObject({ code: 'config_invalid' });
    expect(String(error)).toContain('give a writable cache directory');
  });
});

describe('a build whose place is taken', () => {
  it('says so, and does not wait for what cannot be', async () => {
    await buildModel(dir, { cacheDir });
    const [name = ''] = await readdir(cacheDir);
    await rm(join(cacheDir, name), { recursive: true });
    await writeFile(join(cacheDir, `${name}.partial`), 'no directory');
    const error: unknown = await buildModel(dir, { cacheDir }).catch((reason) => reason);
    expect(error).toMatchObject({ code: 'config_invalid' });
    expect(String(error)).toContain('ENOTDIR');
    expect(await readdir(cacheDir)).toEqual([`${name}.partial`]);
  });
});

describe('a build whose owner was replaced while it slept', () => {
  it('is published by the one that replaced it', async () => {
    const target = join(cacheDir, 'model');
    let isPublishedByOther = false;
    await buildOnce(target, {
      isComplete: () => stat(target).then(Boolean, () => false),
      async build(partial) {
        const owner = join(partial, (await readdir(partial))[0] ?? '');
        await rename(owner, `${owner}-other`);
        setTimeout(async () => {
          await rm(`${owner}-other`).catch(() => {});
          isPublishedByOther = true;
          await rename(partial, target).catch(() => {});
        }, 200);
      },
    });
    expect(isPublishedByOther).toBe(true);
  });
});

describe('a build whose process was killed', () => {
  it('goes on where it was, and ends with the same bytes', async () => {
    await buildAndDie();
    const weights = join(await partialBuild(), 'weights.bin');
    const before = await stat(weights);
    const built = await buildModel(dir, { cacheDir });
    const after = join(dirname(built.stagedGraphPath), 'weights.bin');
    expect((await stat(after)).ino).toBe(before.ino);
    const fresh = await buildModel(dir, { cacheDir: `${cacheDir}-fresh` });
    const bytes = await readFile(join(dirname(fresh.stagedGraphPath), 'weights.bin'));
    expect(bytes.equals(await readFile(after))).toBe(true);
    expect((await readdir(dirname(after))).sort()).toEqual([
      'manifest.json',
      'staged.onnx',
      'uncut.onnx',
      'weights.bin',
    ]);
  });

  it('does not believe what the disk lost', async () => {
    await buildAndDie();
    const weights = await open(join(await partialBuild(), 'weights.bin'), 'r+');
    await weights.write(new Uint8Array(5000), 0, 5000, 100_000);
    await weights.close();
    const built = await buildModel(dir, { cacheDir });
    const fresh = await buildModel(dir, { cacheDir: `${cacheDir}-fresh` });
    const [ours, theirs] = await Promise.all(
      [built, fresh].map(({ stagedGraphPath }) => readFile(join(dirname(stagedGraphPath), 'weights.bin'))),
    );
    expect(ours?.equals(theirs ?? Buffer.alloc(0))).toBe(true);
  });

  it('is left to its owner while that one lives, and taken up when it has been silent', async () => {
    await buildAndDie();
    const partial = await partialBuild();
    const owner = (await readdir(partial)).find((name) => name.startsWith('owner.')) ?? '';
    const living = join(partial, `owner.${hostname().replaceAll(/[^\w-]/g, '-')}.${process.pid}.other`);
    await rename(join(partial, owner), living);
    await utimes(living, new Date(), new Date());
    const building = buildModel(dir, { cacheDir });
    const first = await Promise.race([building, new Promise((resolve) => setTimeout(resolve, 500, 'waiting'))]);
    expect(first).toBe('waiting');
    await utimes(living, 0, 0);
    await building;
    expect(await readdir(cacheDir)).toHaveLength(1);
  });

  it('is removed after a day if nobody wants it', async () => {
    await mkdir(join(cacheDir, 'other-f32-0123.partial'), { recursive: true });
    await utimes(join(cacheDir, 'other-f32-0123.partial'), 0, 0);
    await mkdir(join(cacheDir, 'other-f32-4567.partial'));
    await buildModel(dir, { cacheDir });
    const left = (await readdir(cacheDir)).filter((name) => name.startsWith('other'));
    expect(left).toEqual(['other-f32-4567.partial']);
  });
});

describe('weights that stay in place', () => {
  it('are copied nowhere', async () => {
    const { weightBytes } = await buildModel(dir, { cacheDir, weights: 'checkpoint' });
    const norms = (2 * 6 + 1) * 128 * 4;
    const rotary = 2 * 1024 * 16 * 4;
    expect(weightBytes).toBeLessThan(norms + rotary + 16 * 4096);
  });

  it('are found where links lead, as in the cache of the hub', async () => {
    const blobs = `${dir}-blobs`;
    await mkdir(blobs);
    await rename(join(dir, 'model.safetensors'), join(blobs, 'abc'));
    await symlink('../lamina-tiny-blobs/abc', join(dir, 'model.safetensors'));
    const { dataDir } = await buildModel(dir, { cacheDir, weights: 'checkpoint' });
    expect(dataDir).toBe(dirname(dir));
  });

  it('are built again where the model has been moved', async () => {
    const first = await buildModel(dir, { cacheDir, weights: 'checkpoint' });
    await mkdir(`${dir}-moved`);
    await rename(dir, join(`${dir}-moved`, 'lamina-tiny'));
    dir = join(`${dir}-moved`, 'lamina-tiny');
    const second = await buildModel(dir, { cacheDir, weights: 'checkpoint' });
    expect(second.stagedGraphPath).not.toBe(first.stagedGraphPath);
  });
});

describe('the check of free space', () => {
  it('names what is needed and what is free', async () => {
    await checkFreeSpace(scratch, 1000, 'the model');
    const error: unknown = await checkFreeSpace(scratch, 1e15, 'the model').catch((reason: unknown) => reason);
    if (!(error instanceof LaminaError)) throw error;
    expect(error.code).toBe('config_invalid');
    expect(error.message).toMatch(
      /the model needs 1000000000000000 bytes \(931322\.6 GiB\) and \d+ \(\d+\.\d GiB\) are free/,
    );
  });
});

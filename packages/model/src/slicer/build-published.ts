/**
 * Owns building the staged graph of a published decoder, and what makes two builds the same.
 *
 * Invariants
 * 1. Weights that lie beside the published graph stay there; those inside of it are copied once into a weights file,
 *    since data inside a graph is not aligned. No weight is twice in the built files, however many stages use it.
 * 2. A build is keyed by the published graph's files (path, size, time of change), where the cache is, and the slicer's
 *    version.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, readFile, realpath, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { buildOnce } from '../build-cache.ts';
import { checkFreeSpace } from '../disk-space.ts';
import { writeFully } from '../file-io.ts';
import { encodeModelOf, type OnnxTensor } from '../onnx.ts';
import type { FileRange, PublishedTensor } from './onnx-file.ts';
import type { PublishedDecoder } from './published-model.ts';
import { opsetImportsOf } from './staged-writer.ts';

export interface PublishedBuild {
  readonly stagedGraphPath: string;
  readonly dataDir: string;
  readonly weightBytes: number;
}

/** How paths of a build are found: build-model.ts's, which knows where a session may read. */
export interface BuildPlaces {
  /** Real path of the cache directory. */
  readonly cacheDir: string;
  /** Deepest directory above all paths. */
  commonDirectory(paths: readonly string[]): string;
  locationOf(dataDir: string, path: string): string;
}

/** Raise it with every change of what the slicer writes for the same graph. */
const SLICER_VERSION = 2;
const STAGED_FILE_NAME = 'staged.onnx';
const WEIGHTS_FILE_NAME = 'weights.bin';
const MANIFEST_FILE_NAME = 'manifest.json';
/** A page, so that ONNX Runtime maps the file instead of copying it. */
const ALIGNMENT_BYTES = 4096;
const EXTERNAL = 1;

const manifestSchema = z.object({ key: z.string(), files: z.record(z.string(), z.int().nonnegative()) });

/** Copies of ranges of the published graph, laid out one after the other. */
interface Copies {
  readonly ranges: Map<string, { readonly from: FileRange; readonly byteOffset: number }>;
  totalBytes: number;
}

export async function buildPublished(
  modelId: string,
  decoder: PublishedDecoder,
  places: BuildPlaces,
  onProgress: (doneBytes: number, totalBytes: number) => void,
): Promise<PublishedBuild> {
  const { path, variant, sliced } = decoder;
  const external = new Map<string, string>();
  for (const { source } of sliced.graph.initializers.values()) {
    if (source instanceof Uint8Array || source.file === path || external.has(source.file)) continue;
    external.set(source.file, await realpath(source.file));
  }
  const stats = await Promise.all(
    [path, ...external.values()].map(async (file) => {
      const { size, mtimeMs } = await stat(file);
      return [await realpath(file), size, mtimeMs];
    }),
  );
  const facts = JSON.stringify([SLICER_VERSION, external.size === 0 ? '' : places.cacheDir, stats]);
  const key = createHash('sha256').update(facts).digest('hex');
  const target = join(places.cacheDir, `${modelId}-${variant}-${key.slice(0, 16)}`);
  const dataDir = external.size === 0 ? target : places.commonDirectory([target, ...external.values()]);
  const build = { decoder, key, target, dataDir, external, places };
  await buildOnce(target, {
    isComplete: (dir) => isComplete(dir, key),
    build: (dir) => write(build, dir, onProgress),
  });
  const weightBytes = (await stat(join(target, WEIGHTS_FILE_NAME))).size;
  onProgress(weightBytes, weightBytes);
  return { stagedGraphPath: join(target, STAGED_FILE_NAME), dataDir, weightBytes };
}

async function write(
  build: {
    readonly decoder: PublishedDecoder;
    readonly key: string;
    readonly target: string;
    readonly dataDir: string;
    readonly external: ReadonlyMap<string, string>;
    readonly places: BuildPlaces;
  },
  dir: string,
  onProgress: (doneBytes: number, totalBytes: number) => void,
): Promise<void> {
  const { decoder, key, target, dataDir, external, places } = build;
  const { graph } = decoder.sliced;
  const copies: Copies = { ranges: new Map(), totalBytes: 0 };
  const weightsLocation = places.locationOf(dataDir, join(target, WEIGHTS_FILE_NAME));
  const place = (tensor: PublishedTensor, name: string): OnnxTensor => {
    const { dataType, dims, source } = tensor;
    if (source instanceof Uint8Array) return { name, dataType, dims: [...dims], rawData: source };
    const file = external.get(source.file);
    const location = file === undefined ? weightsLocation : places.locationOf(dataDir, file);
    const byteOffset = file === undefined ? copied(copies, source) : source.byteOffset;
    return {
      name,
      dataType,
      dims: [...dims],
      dataLocation: EXTERNAL,
      externalData: [
        { key: 'location', value: location },
        { key: 'offset', value: String(byteOffset) },
        { key: 'length', value: String(source.byteLength) },
      ],
    };
  };
  const bytes = encodeModelOf(decoder.sliced.stagedGraph(place), graph.irVersion, opsetImportsOf(graph));
  await mkdir(dir, { recursive: true });
  await checkFreeSpace(dir, copies.totalBytes + bytes.byteLength, `the staged graph of ${decoder.path}`);
  await copyRanges(copies, join(dir, WEIGHTS_FILE_NAME), onProgress);
  await writeFile(join(dir, STAGED_FILE_NAME), bytes);
  const files = { [STAGED_FILE_NAME]: bytes.byteLength, [WEIGHTS_FILE_NAME]: copies.totalBytes };
  await writeFile(join(dir, MANIFEST_FILE_NAME), JSON.stringify({ key, files }));
}

/** Where the copy of a range lies; the same range is copied once. */
function copied(copies: Copies, from: FileRange): number {
  const id = `${from.byteOffset}`;
  const known = copies.ranges.get(id);
  if (known !== undefined) return known.byteOffset;
  const byteOffset = Math.ceil(copies.totalBytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
  copies.ranges.set(id, { from, byteOffset });
  copies.totalBytes = byteOffset + from.byteLength;
  return byteOffset;
}

async function copyRanges(
  { ranges, totalBytes }: Copies,
  path: string,
  onProgress: (doneBytes: number, totalBytes: number) => void,
): Promise<void> {
  const file = await open(path, 'w');
  try {
    await file.truncate(totalBytes);
    for (const { from, byteOffset } of ranges.values()) {
      let position = byteOffset;
      const end = from.byteOffset + from.byteLength - 1;
      const chunks: AsyncIterable<Buffer> = createReadStream(from.file, {
        start: from.byteOffset,
        end,
        highWaterMark: 1 << 22,
      });
      for await (const chunk of chunks) position = await writeFully(file, chunk, position);
      onProgress(position, totalBytes);
    }
    await file.datasync();
  } finally {
    await file.close();
  }
}

async function isComplete(target: string, key: string): Promise<boolean> {
  try {
    const manifest = manifestSchema.parse(JSON.parse(await readFile(join(target, MANIFEST_FILE_NAME), 'utf8')));
    if (manifest.key !== key) return false;
    for (const [name, size] of Object.entries(manifest.files)) {
      if ((await stat(join(target, name))).size !== size) return false;
    }
    return true;
  } catch {
    // Absent, unreadable or no manifest: whatever the reason, the answer is to build it again.
    return false;
  }
}

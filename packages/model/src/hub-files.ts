/**
 * Owns which files of a repository a model is: configuration, tokenizer, and one form of the weights.
 *
 *   at the top           safetensors, or onnx/model*.onnx in several variants
 *   folder by folder     onnxruntime-genai: each folder with a genai_config.json is a whole model for one device
 *
 * Invariants
 * 1. Pickled weights are never among them.
 * 2. A file is named by the repository and written below a directory of ours: a path that would leave it is refused.
 */
import { modelInvalid } from './model-error.ts';

export interface RepoFile {
  /** Relative, with slashes. */
  readonly path: string;
  readonly bytes: number;
  /** sha256: of the contents. git: the id of the blob, a SHA-1 over a header and the contents. */
  readonly checksum: { readonly kind: 'sha256' | 'git'; readonly hex: string };
}

/** A file, and where it belongs in the directory of the pulled model. */
export interface SelectedFile extends RepoFile {
  readonly localPath: string;
}

/**
 * `safetensors`, or how the file of an ONNX decoder is called: `onnx/model_q4f16.onnx` is q4f16, `onnx/model.onnx` fp32.
 * A folder of onnxruntime-genai is `genai/FOLDER`.
 */
export type Variant = string;

export const SAFETENSORS_VARIANT = 'safetensors';
/** Configuration and tokenizer of a safetensors repository, without weights. */
export const TEXT_VARIANT = 'text';

export interface Selection {
  readonly variant: Variant;
  readonly files: readonly SelectedFile[];
}

export interface Wanted {
  /** Default: the repository's own form, safetensors if it has them, the only ONNX variant, or fp32. */
  readonly weights?: Variant | undefined;
  /** Default: the top, else the only folder with a model, else the only such folder for CPUs. */
  readonly folder?: string | undefined;
  /** Without the weights, where those are files of their own (safetensors). */
  readonly textOnly?: boolean | undefined;
}

const TEXT_FILES = new Set([
  'config.json',
  'generation_config.json',
  'genai_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.json',
  'chat_template.jinja',
]);
const SAFETENSORS_INDEX = 'model.safetensors.index.json';
const SHARD = /^model-\d+-of-\d+\.safetensors$/;
const ONNX = /^(?:onnx\/)?(?:decoder_)?model(?:_merged)?(?:_([a-z0-9]+))?\.onnx$/;
const PICKLED = /\.(?:bin|pt|pth|ckpt|pkl)$/;
const GENAI_CONFIG = 'genai_config.json';
/** A graph of onnxruntime-genai and its data: genai_config.json says which name it has. */
const GENAI_GRAPH = /^[^/]+\.onnx(?:[._]data(?:_\d+)?)?$/;
const FOR_CPU = /(?:^|[^a-z0-9])cpu(?:[^a-z0-9]|$)/i;

/** The variant that a folder of onnxruntime-genai is. */
export function genaiVariant(folder: string): Variant {
  return `genai/${folder}`;
}

/**
 * The files of the model that is wanted of a repository.
 * @param repo For messages.
 * @throws LaminaError `model_invalid` that names what the repository has.
 */
export function selectFiles(repo: string, listing: readonly RepoFile[], wanted: Wanted): Selection {
  for (const { path } of listing) {
    if (path.split('/').includes('..') || path.startsWith('/') || path.includes('\\')) {
      throw modelInvalid(repo, `names a file '${path}'`, 'do not use this repository');
    }
  }
  const variants = variantsOf(listing);
  const folders = listing.flatMap(({ path }) => (baseName(path) === GENAI_CONFIG ? [folderOf(path)] : []));
  const isFolderMeant = wanted.folder !== undefined || (variants.size === 0 && folders.length > 0);
  if (isFolderMeant) return selectFolder(repo, listing, folders, wanted);
  const text = listing.filter(({ path }) => TEXT_FILES.has(path));
  if (!text.some(({ path }) => path === 'config.json' || path === GENAI_CONFIG)) {
    throw modelInvalid(repo, 'has no config.json', 'use a repository in transformers format, or an ONNX decoder');
  }
  const variant = chooseVariant(repo, listing, [...variants.keys()], wanted.weights);
  const isText = wanted.textOnly === true && variant === SAFETENSORS_VARIANT;
  const files = isText ? text : [...text, ...(variants.get(variant) ?? [])];
  return {
    variant: isText ? TEXT_VARIANT : variant,
    files: files.map((file) => ({ ...file, localPath: file.path })),
  };
}

/** One folder's model. What describes it and its tokenizer may also be at the top, for all folders. */
function selectFolder(
  repo: string,
  listing: readonly RepoFile[],
  folders: readonly string[],
  { weights, folder: asked }: Wanted,
): Selection {
  const folder = chooseFolder(repo, folders, asked, weights);
  const own = listing.flatMap((file): SelectedFile[] => {
    const name = baseName(file.path);
    const isWanted = folderOf(file.path) === folder && (TEXT_FILES.has(name) || GENAI_GRAPH.test(name));
    return isWanted ? [{ ...file, localPath: name }] : [];
  });
  if (!own.some(({ localPath }) => localPath.endsWith('.onnx'))) {
    throw modelInvalid(repo, `has no *.onnx in its folder '${folder}'`, `name a folder with a model: ${list(folders)}`);
  }
  const names = new Set(own.map(({ localPath }) => localPath));
  const shared = listing.filter(({ path }) => TEXT_FILES.has(path) && !names.has(path));
  return {
    variant: genaiVariant(folder),
    files: [...own, ...shared.map((file) => ({ ...file, localPath: file.path }))],
  };
}

function chooseFolder(
  repo: string,
  folders: readonly string[],
  asked: string | undefined,
  weights: Variant | undefined,
): string {
  if (asked !== undefined) {
    if (weights !== undefined) {
      throw modelInvalid(
        repo,
        `is given a folder and weights '${weights}'`,
        'leave --weights out: a folder has one form',
      );
    }
    if (folders.includes(asked)) return asked;
    const has = folders.length === 0 ? 'it has none' : `it has: ${list(folders)}`;
    throw modelInvalid(repo, `has no folder '${asked}' with a ${GENAI_CONFIG}`, `name one that it has (${has})`);
  }
  const remedy = `name one, as in ${repo}:${folders[0] || 'folder'} (it has: ${list(folders)})`;
  if (weights !== undefined) {
    throw modelInvalid(repo, `has no weights '${weights}', but a model in each of its folders`, remedy);
  }
  if (folders.includes('')) return '';
  const forCpu = folders.filter((folder) => FOR_CPU.test(folder));
  const [only] = folders.length === 1 ? folders : forCpu.length === 1 ? forCpu : [];
  if (only !== undefined) return only;
  const several = `${forCpu.length === 0 ? 'none' : forCpu.length} of them for CPUs by name`;
  throw modelInvalid(repo, `has models in ${folders.length} folders, ${several}`, remedy);
}

const list = (folders: readonly string[]): string => folders.map((folder) => folder || '(top)').join(', ');

function baseName(path: string): string {
  return path.slice(path.lastIndexOf('/') + 1);
}

/** Empty for a file at the top. */
function folderOf(path: string): string {
  return path.slice(0, Math.max(0, path.lastIndexOf('/')));
}

/** Each form of the weights that the repository has, with its files. */
function variantsOf(listing: readonly RepoFile[]): ReadonlyMap<Variant, readonly RepoFile[]> {
  const variants = new Map<Variant, readonly RepoFile[]>();
  const index = listing.find(({ path }) => path === SAFETENSORS_INDEX);
  const weights =
    index === undefined
      ? listing.filter(({ path }) => path === 'model.safetensors')
      : [index, ...listing.filter(({ path }) => SHARD.test(path))];
  if (weights.length > 0) variants.set(SAFETENSORS_VARIANT, weights);
  for (const graph of listing) {
    const match = ONNX.exec(graph.path);
    if (match === null || variants.has(match[1] ?? 'fp32')) continue;
    // model.onnx_data, model.onnx_data_1, model.onnx.data
    const data = listing.filter(
      ({ path }) => /^[._]data(?:_\d+)?$/.test(path.slice(graph.path.length)) && path.startsWith(graph.path),
    );
    variants.set(match[1] ?? 'fp32', [graph, ...data]);
  }
  return variants;
}

function chooseVariant(
  repo: string,
  listing: readonly RepoFile[],
  variants: readonly Variant[],
  asked: Variant | undefined,
): Variant {
  if (asked !== undefined && variants.includes(asked)) return asked;
  const [first] = variants;
  if (first === undefined) {
    const problem = listing.some(({ path }) => PICKLED.test(path))
      ? 'has pickled weights only, which run code when they are loaded and are refused'
      : 'has neither model.safetensors nor onnx/model*.onnx';
    throw modelInvalid(repo, problem, 'use a repository with safetensors or an ONNX decoder');
  }
  if (asked !== undefined) {
    throw modelInvalid(repo, `has no weights '${asked}'`, `give --weights one of: ${variants.join(', ')}`);
  }
  if (variants.includes(SAFETENSORS_VARIANT)) return SAFETENSORS_VARIANT;
  if (variants.length === 1) return first;
  if (variants.includes('fp32')) return 'fp32';
  throw modelInvalid(repo, 'has ONNX decoders only', `choose with --weights one of: ${variants.join(', ')}`);
}

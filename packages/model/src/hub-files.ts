/**
 * Owns which files of a repository a model is: configuration, tokenizer, and one form of the weights.
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

/** `safetensors`, or how the file of an ONNX decoder is called: `onnx/model_q4f16.onnx` is q4f16, `onnx/model.onnx` fp32. */
export type Variant = string;

export const SAFETENSORS_VARIANT = 'safetensors';
/** Configuration and tokenizer of a safetensors repository, without weights. */
export const TEXT_VARIANT = 'text';

export interface Selection {
  readonly variant: Variant;
  readonly files: readonly RepoFile[];
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

/**
 * The files of `weights`, else of the repository's own form: safetensors if it has them, the only ONNX variant, or fp32.
 * @param repo For messages.
 * @throws LaminaError `model_invalid` that names what the repository has.
 */
export function selectFiles(
  repo: string,
  listing: readonly RepoFile[],
  weights: Variant | undefined,
  textOnly = false,
): Selection {
  for (const { path } of listing) {
    if (path.split('/').includes('..') || path.startsWith('/') || path.includes('\\')) {
      throw modelInvalid(repo, `names a file '${path}'`, 'do not use this repository');
    }
  }
  const text = listing.filter(({ path }) => TEXT_FILES.has(path));
  if (!text.some(({ path }) => path === 'config.json')) {
    throw modelInvalid(repo, 'has no config.json', 'use a repository in transformers format, or an ONNX decoder');
  }
  const variants = variantsOf(listing);
  const variant = chooseVariant(repo, listing, [...variants.keys()], weights);
  if (textOnly && variant === SAFETENSORS_VARIANT) return { variant: TEXT_VARIANT, files: text };
  return { variant, files: [...text, ...(variants.get(variant) ?? [])] };
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

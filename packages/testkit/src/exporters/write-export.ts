/**
 * Owns writing a published decoder as a directory, configuration and tokenizer included: as transformers.js looks for
 * it, or as a folder of onnxruntime-genai.
 *
 * Invariants
 * 1. The same options give the same bytes; transformers.js and this project run the same directory.
 */
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { encodeModelOf, type OnnxGraph, type OnnxTensor, type OpsetImport } from '@lamina/model';
import { writeTokenizer } from '../random-checkpoint.ts';
import { EXPORT_DEFAULTS, type ExportForm, type ExportOptions } from './export-options.ts';
import { makeGpt2 } from './gpt2-export.ts';
import type { Precision } from './graph-maker.ts';
import { makeLlama } from './llama-export.ts';

export interface WrittenExport {
  readonly options: ExportOptions;
  /** Absolute path of the graph. */
  readonly path: string;
}

const EXTERNAL_ABOVE_BYTES = 1024;
const ALIGNMENT_BYTES = 4096;
const EXTERNAL = 1;

/** Writes a decoder into `dir` (created if missing) as transformers.js expects it: onnx/model*.onnx. */
export async function writeExport(
  dir: string,
  form: ExportForm,
  given: Partial<ExportOptions> = {},
): Promise<WrittenExport> {
  const options = optionsOf(form, given);
  await mkdir(join(dir, 'onnx'), { recursive: true });
  await writeFile(join(dir, 'config.json'), JSON.stringify(configOf(options)));
  await writeTokenizer(dir);
  const path = join(dir, 'onnx', `model${SUFFIX[options.precision]}.onnx`);
  await writeGraph(path, options, '_data');
  return { options, path };
}

/**
 * Writes a decoder into `dir` (created if missing) as the model builder of onnxruntime-genai lays out one folder:
 * genai_config.json, which names the graph, the graph with its data beside it, and the tokenizer.
 */
export async function writeGenaiExport(
  dir: string,
  form: ExportForm,
  given: Partial<ExportOptions> & { readonly fileName?: string } = {},
): Promise<WrittenExport> {
  const { fileName = 'model.onnx', ...rest } = given;
  const options = optionsOf(form, { ...rest, externalData: true });
  await mkdir(dir, { recursive: true });
  await writeTokenizer(dir);
  // The builder puts what it says into genai_config.json.
  await rm(join(dir, 'generation_config.json'));
  const model = {
    type: 'phi3',
    bos_token_id: 1,
    eos_token_id: GENAI_EOS,
    context_length: options.contextLength,
    vocab_size: options.vocabSize,
    decoder: { filename: fileName, head_size: options.headDim, num_hidden_layers: options.numLayers },
  };
  await writeFile(join(dir, 'genai_config.json'), JSON.stringify({ model }));
  const path = join(dir, fileName);
  await writeGraph(path, options, '.data');
  return { options, path };
}

const GENAI_EOS = [256, 7];

function optionsOf(form: ExportForm, given: Partial<ExportOptions>): ExportOptions {
  const defaults =
    form.operator === 'gpt2' ? { ...EXPORT_DEFAULTS, numKvHeads: EXPORT_DEFAULTS.numHeads } : EXPORT_DEFAULTS;
  return { ...defaults, ...given, form };
}

async function writeGraph(path: string, options: ExportOptions, dataSuffix: string): Promise<void> {
  const { form } = options;
  const graph = (form.operator === 'gpt2' ? makeGpt2(options) : makeLlama(options)).graph();
  const shaped = form.operator === 'gpt2' && form.merged === true ? mergedGraph(graph) : graph;
  const [irVersion, opsets] = versionsOf(form);
  if (!options.externalData) {
    await writeFile(path, encodeModelOf(shaped, irVersion, opsets));
    return;
  }
  const { initializer, data } = outsideOf(shaped.initializer ?? [], `${basename(path)}${dataSuffix}`);
  await writeFile(path, encodeModelOf({ ...shaped, initializer }, irVersion, opsets));
  await writeFile(`${path}${dataSuffix}`, data);
}

const SUFFIX: Readonly<Record<Precision, string>> = {
  fp32: '',
  fp16: '_fp16',
  q4: '_q4',
  q4f16: '_q4f16',
  int8: '_int8',
  uint8: '_uint8',
  bnb4: '_bnb4',
};

function versionsOf(form: ExportForm): [number, OpsetImport[]] {
  const microsoft = { domain: 'com.microsoft', version: 1 };
  if (form.operator === 'onnx') return [10, [{ domain: '', version: 23 }]];
  return [form.operator === 'gpt2' ? 7 : 8, [{ domain: '', version: form.operator === 'gpt2' ? 14 : 18 }, microsoft]];
}

/** The whole decoder as the branches of an If on `use_cache_branch`; weights stay outside. */
function mergedGraph(graph: OnnxGraph): OnnxGraph {
  const branch = (name: string): OnnxGraph => ({
    name,
    node: (graph.node ?? []).map((node) => ({
      ...node,
      output: (node.output ?? []).map((output) => `${name}/${output}`),
      input: (node.input ?? []).map((input) => (made.has(input) ? `${name}/${input}` : input)),
    })),
    output: (graph.output ?? []).map((output) => ({ ...output, name: `${name}/${output.name}` })),
  });
  const made = new Set((graph.node ?? []).flatMap((node) => node.output ?? []));
  const choice = {
    name: 'optimum::if',
    opType: 'If',
    input: ['use_cache_branch'],
    output: (graph.output ?? []).map(({ name }) => name ?? ''),
    attribute: [
      { name: 'then_branch', type: GRAPH_ATTRIBUTE, g: branch('with_past') },
      { name: 'else_branch', type: GRAPH_ATTRIBUTE, g: branch('no_past') },
    ],
  };
  return { ...graph, node: [choice] };
}

const GRAPH_ATTRIBUTE = 5;

function outsideOf(tensors: readonly OnnxTensor[], location: string): { initializer: OnnxTensor[]; data: Uint8Array } {
  const parts: Uint8Array[] = [];
  let end = 0;
  const initializer = tensors.map((tensor): OnnxTensor => {
    const { rawData, ...rest } = tensor;
    if (rawData === null || rawData === undefined || rawData.byteLength <= EXTERNAL_ABOVE_BYTES) return tensor;
    const padding = (ALIGNMENT_BYTES - (end % ALIGNMENT_BYTES)) % ALIGNMENT_BYTES;
    const offset = end + padding;
    parts.push(new Uint8Array(padding), rawData);
    end = offset + rawData.byteLength;
    const externalData = [
      { key: 'location', value: location },
      { key: 'offset', value: String(offset) },
      { key: 'length', value: String(rawData.byteLength) },
    ];
    return { ...rest, dataLocation: EXTERNAL, externalData };
  });
  return { initializer, data: Buffer.concat(parts) };
}

function configOf(options: ExportOptions): Record<string, unknown> {
  const { form, hiddenSize, numLayers, numHeads, contextLength, vocabSize } = options;
  const tokens = { vocab_size: vocabSize, bos_token_id: 256, eos_token_id: 256 };
  if (form.operator === 'gpt2') {
    return {
      model_type: 'gpt2',
      n_embd: hiddenSize,
      n_layer: numLayers,
      n_head: numHeads,
      n_positions: contextLength,
      n_ctx: contextLength,
      ...tokens,
    };
  }
  return {
    model_type: 'llama',
    hidden_size: hiddenSize,
    intermediate_size: options.intermediateSize,
    num_hidden_layers: numLayers,
    num_attention_heads: numHeads,
    num_key_value_heads: options.numKvHeads,
    head_dim: options.headDim,
    max_position_embeddings: contextLength,
    ...('window' in form && form.window !== undefined && form.window > 0 ? { sliding_window: form.window } : {}),
    ...(floatIsHalf(options.precision)
      ? { 'transformers.js_config': { kv_cache_dtype: { fp16: 'float16', q4f16: 'float16' } } }
      : {}),
    ...tokens,
  };
}

function floatIsHalf(precision: Precision): boolean {
  return precision === 'fp16' || precision === 'q4f16';
}

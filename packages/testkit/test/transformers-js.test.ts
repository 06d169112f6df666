/**
 * Published ONNX decoders against `@huggingface/transformers`: the same directory, fed by transformers.js, must choose
 * the tokens that the uncut graph chooses here (and so, by published.test.ts, the cut one).
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { AutoModelForCausalLM, env, Tensor } from '@huggingface/transformers';
import { buildModel } from '@lamina/model';
import { UncutReference, writeExport } from '@lamina/testkit';
import { afterAll, expect, it } from 'vitest';
import { PUBLISHED_FORMS } from './published-forms.ts';

const NUM_GREEDY = 64;
const dir = mkdtempSync(join(tmpdir(), 'lamina-transformers-'));
afterAll(() => rmSync(dir, { recursive: true, force: true }));

env.allowRemoteModels = false;
env.localModelPath = `${dir}/`;

it.each(PUBLISHED_FORMS.filter(({ runsInTransformersJs }) => runsInTransformersJs))(
  '$name: transformers.js chooses the same 64 tokens',
  async ({ name, form, options }) => {
    const model = join(dir, name.replaceAll(/\W+/g, '-'));
    const written = await writeExport(model, form, options);
    expect(dirname(model)).toBe(dir);
    const decoder = await AutoModelForCausalLM.from_pretrained(basename(model), {
      local_files_only: true,
      device: 'cpu',
      dtype: written.options.precision,
      use_external_data_format: written.options.externalData,
    });
    const prompt = Array.from({ length: 17 }, (_, i) => (i * 37 + 91 + i * i * 3) % 256);
    const generated = await decoder.generate({
      input_ids: new Tensor('int64', BigInt64Array.from(prompt, BigInt), [1, prompt.length]),
      attention_mask: new Tensor('int64', new BigInt64Array(prompt.length).fill(1n), [1, prompt.length]),
      max_new_tokens: NUM_GREEDY,
      do_sample: false,
      eos_token_id: -1,
    });
    await decoder.dispose();
    if (!(generated instanceof Tensor)) throw new TypeError('no tokens');
    const uncut = await UncutReference.load(await buildModel(model, { cacheDir: join(dir, 'cache') }));
    const greedy = await uncut.greedy(prompt, NUM_GREEDY, { ignoreEos: true });
    await uncut.release();
    expect(Array.from(generated.data, Number).slice(prompt.length)).toEqual(greedy.tokenIds);
  },
);

/**
 * Owns the command line of the chaos run: `npm run chaos -- [--long] [--seed N] [--json FILE] [--only TEXT]`.
 * What follows `--only` is a regular expression over the names of the scenarios; a FILE that exists keeps its rows of others.
 */
import { parseArgs } from 'node:util';

/**
 * @param {readonly string[]} args
 * @returns {{ environment: Record<string, string>, vitestArgs: string[] }}
 */
export function readChaosArguments(args) {
  const { values } = parseArgs({
    args: [...args],
    options: {
      long: { type: 'boolean', default: false },
      seed: { type: 'string', default: '1' },
      json: { type: 'string' },
      only: { type: 'string' },
      reporter: { type: 'string', multiple: true, default: [] },
      outputFile: { type: 'string' },
    },
  });
  if (!/^\d{1,9}$/.test(values.seed)) throw new TypeError(`--seed ${values.seed}: must be a number of up to 9 digits`);
  return {
    environment: {
      LAMINA_CHAOS_LONG: values.long ? '1' : '0',
      LAMINA_CHAOS_SEED: values.seed,
      ...(values.json !== undefined && { LAMINA_CHAOS_JSON: values.json }),
    },
    vitestArgs: [
      ...['--config', 'test/chaos/vitest.config.ts'],
      ...(values.only === undefined ? [] : ['-t', values.only]),
      ...values.reporter.map((name) => `--reporter=${name}`),
      ...(values.outputFile === undefined ? [] : [`--outputFile.json=${values.outputFile}`]),
    ],
  };
}

/** Owns `lamina model pull`: progress on stderr, the directory of the model on stdout. */
import { pullModel } from '@lamina/model';
import { hubVariables } from '@lamina/runtime';
import { bytesText } from '../table.ts';
import { cacheDirOf, type Environment } from './find-model.ts';
import { showPull } from './progress.ts';

export interface PullFlags {
  readonly weights?: string;
  readonly folder?: string;
}

export async function runPull(given: string, flags: PullFlags, environment: Environment): Promise<number> {
  const shown = showPull(process.stderr);
  const repo = flags.folder === undefined ? given : `${given}:${flags.folder}`;
  const options = { ...hubVariables(environment), cacheDir: cacheDirOf(environment), weights: flags.weights };
  try {
    const pulled = await pullModel(repo, { ...options, ...shown });
    shown.done();
    const { variant, files, totalBytes, commit } = pulled;
    const what = `${variant}, ${files} files, ${bytesText(totalBytes)}, checked; commit ${commit.slice(0, 12)}`;
    process.stderr.write(`${repo}: ${pulled.isCached ? 'is here and up to date' : 'pulled'} (${what})\n`);
    process.stdout.write(`${pulled.dir}\n`);
    return 0;
  } finally {
    shown.done();
  }
}

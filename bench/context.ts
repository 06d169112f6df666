/** Owns what all parts share: how long to measure, where models are kept, what is said meanwhile. */
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { ROOT_DIRECTORY } from '@lamina/cli';
import type { WindowLimits } from './peers/peer.ts';

export interface Context {
  readonly isQuick: boolean;
  /** Rounds of ours and the peer's in turn. */
  readonly rounds: number;
  readonly window: WindowLimits;
  /** Threads that each side may use. */
  readonly threads: number;
  /** Directory of models; kept between runs. */
  readonly directory: string;
  readonly say: (line: string) => void;
}

export function contextOf(isQuick: boolean, say: (line: string) => void): Context {
  return {
    isQuick,
    rounds: isQuick ? 2 : 5,
    window: isQuick ? { minSteps: 4, maxSeconds: 3 } : { minSteps: 12, maxSeconds: 4.5 },
    threads: availableParallelism(),
    directory: join(ROOT_DIRECTORY, '.lamina', 'bench'),
    say,
  };
}

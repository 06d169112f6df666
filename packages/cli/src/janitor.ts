/**
 * Owns cleaning up when the launcher itself is killed and cannot: a shell that outlives it, and nothing more.
 *
 * Invariants
 * 1. It acts only when its input ends without `done`; a launcher that stopped everything itself says so.
 * 2. It runs no JavaScript, holds no port and uses no time while it waits.
 */
import { spawn } from 'node:child_process';

const SCRIPT = `
pids=''
dir=''
while read -r word value; do
  case "$word" in
    pid) pids="$pids $value" ;;
    gone) pids=$(printf '%s' "$pids " | sed "s/ $value / /; s/ *$//") ;;
    dir) dir="$value" ;;
    done) exit 0 ;;
  esac
done
[ -n "$pids" ] && kill -TERM $pids 2>/dev/null && sleep 3
[ -n "$pids" ] && kill -KILL $pids 2>/dev/null
[ -n "$dir" ] && rm -rf -- "$dir"
exit 0
`;

export class Janitor {
  readonly #shell = spawn('/bin/sh', ['-c', SCRIPT], { stdio: ['pipe', 'ignore', 'ignore'], detached: true });

  constructor() {
    // Without it a cluster runs as well; what it would have done is then left to the user.
    this.#shell.on('error', () => undefined);
    this.#shell.stdin.on('error', () => undefined);
    this.#shell.unref();
  }

  /** A process that must not outlive the launcher. */
  watch(pid: number | undefined): void {
    if (pid !== undefined) this.#tell(`pid ${pid}`);
  }

  /** A process that ended: its id may belong to another one soon. */
  forget(pid: number | undefined): void {
    if (pid !== undefined) this.#tell(`gone ${pid}`);
  }

  /** A temporary directory to remove. */
  own(directory: string): void {
    this.#tell(`dir ${directory}`);
  }

  done(): void {
    this.#tell('done');
    this.#shell.stdin.end();
  }

  #tell(line: string): void {
    this.#shell.stdin.write(`${line}\n`);
  }
}

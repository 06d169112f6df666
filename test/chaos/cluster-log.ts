/** Owns what the processes of a chaos run log: the last lines, who waits for one, and the addresses at which gateways listen. */

const LOG_LINES = 600;
const LISTENING = '"msg":"listening"';

export class ClusterLog {
  readonly #lines: string[] = [];
  readonly #watchers = new Set<(line: string) => void>();
  readonly #urls = new Map<string, string>();

  /** A line of a process, which those who wait for one see. */
  hear(name: string, line: string): void {
    this.keep(name, line);
    for (const watcher of this.#watchers) watcher(line);
  }

  /** A line of a process that nobody waits for. */
  keep(name: string, line: string): void {
    this.#lines.push(`[${name}] ${line}`);
    if (this.#lines.length > LOG_LINES) this.#lines.shift();
    if (!line.includes(LISTENING)) return;
    const { host, httpPort } = Object(JSON.parse(line));
    this.#urls.set(name, `http://${host}:${httpPort}`);
  }

  watch(watcher: (line: string) => void): () => void {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  /** Where a process serves HTTP, once it does. */
  urlOf(name: string): string | undefined {
    return this.#urls.get(name);
  }

  get text(): string {
    return this.#lines.join('\n');
  }
}

// One user's stored data and anchors; export and erase.
import { call, text, userPath, wasStopped } from '../api.js';
import { Adapters } from '../parts/adapters.js';
import { html, useEffect, useRef, useState } from '../parts/html.js';
import { AddItems, Items } from '../parts/items.js';
import { go, note } from '../parts/links.js';
import { Anchors, anchorsTitle, Erased, Facts, Notice, Sure, UserId } from '../parts/widgets.js';
import { bytes, count, moment, shortened, SOURCES } from '../parts/words.js';

export function Users({ params }) {
	const [typed, setTyped] = useState(params.get('id') ?? '');
	const [id, setId] = useState(params.get('id') ?? '');
	const [user, setUser] = useState(null); // null, 'looking', 'unknown' or the stored data
	const [fault, setFault] = useState(null);
	const [erased, setErased] = useState(null);
	const looking = useRef(); // of the user looked up last
	useEffect(() => { if (id) look(id); return () => looking.current?.abort(); }, []);

	async function look(wanted, again = false) {
		looking.current?.abort();
		const { signal } = looking.current = new AbortController();
		setId(wanted);
		setFault(null);
		setErased(null);
		if (!again) setUser('looking');
		note('users', { id: wanted });
		try {
			setUser(await call('GET', userPath(wanted), undefined, { signal }));
		} catch (error) {
			if (wasStopped(error)) return;
			setUser(error.status === 404 ? 'unknown' : null);
			if (error.status !== 404) setFault(error);
		}
	}

	async function erase() {
		setFault(null);
		const { signal } = looking.current;
		try {
			const told = await call('DELETE', userPath(id));
			setErased(told);
			if (!signal.aborted) setUser(null);
		} catch (error) {
			setFault(error);
		}
	}

	async function take() {
		try {
			const href = URL.createObjectURL(new Blob([await text(`${userPath(id)}/export`)]));
			Object.assign(document.createElement('a'), { href, download: `${id}.json` }).click();
			setTimeout(() => URL.revokeObjectURL(href), 60_000); // the download has begun by then
		} catch (error) {
			setFault(error);
		}
	}

	const submit = (event) => { event.preventDefault(); look(typed.trim()); };
	return html`
		<h1 tabindex="-1">Users</h1>
		<p class="lead">Ids are stored as keyed hashes, so users can be found by exact id but not listed.</p>
		<form class="card inline" role="search" onSubmit=${submit}>
			<${UserId} value=${typed} onValue=${setTyped} />
			<button type="submit" class="main">Look up</button>
		</form>
		<${Notice} error=${fault} again=${user ? undefined : () => look(id)} />
		${erased && html`<${Erased} erased=${erased} />`}
		<div aria-live="polite">
			${user === 'looking' && html`<p class="dim">Looking …</p>`}
			${user === 'unknown' && html`<${Notice} calm>Nothing is stored about <span class="mono">${shortened(id, 64)}</span>.
				Add items below to create a profile.<//>`}
		</div>
		${(user === 'unknown' || user?.user_id) && html`<div class=${user.user_id ? 'columns' : ''}>
			${user.user_id && html`<${Stored} user=${user} />
				<${Adapters} key=${`adapters ${id}`} id=${id} serving=${user.adapter?.id} onServe=${() => look(id, true)} />
				<${Items} key=${`items ${id}`} id=${id} many=${user.items} changed=${user.updated_at} />`}
			<${AddItems} key=${id} id=${id} onAdded=${() => look(id, true)} />
			${user.user_id && html`<section class="card" aria-label="Export or erase">
				<h2>Export or erase</h2>
				<p><button type="button" class="link" onClick=${take}>Export</button> all data of
					${' '}<span class="mono">${shortened(id, 64)}</span> as JSON, or erase it: items, samples, jobs and adapters.</p>
				<${Sure} key=${id} label="Erase" question=${`Erase ${shortened(id, 64)} for good?`} onYes=${erase} />
			</section>`}
		</div>`}`;
}

function Stored({ user }) {
	return html`
		<section class="card" aria-label="What is stored">
			<h2 class="mono">${shortened(user.user_id, 64)}</h2>
			<${Facts} label="What is stored" rows=${[
				['Items', count(user.items, 'item')],
				['In the store', bytes(user.bytes)],
				['Changed', moment(user.updated_at)],
				['Repeated words', user.phrases == null ? 'not read yet' : count(user.phrases, 'phrase')],
				['Embedder', user.embedder.slice(0, 12), true],
				['Recipe', user.recipe, true],
			]} />
			<p class="actions">
				<a href=${go('playground', { user: user.user_id })}>Ask as this user</a>
				<a href=${go('bank', { user: user.user_id })}>Show on the map</a>
				<a href=${go('adapt', { user: user.user_id })}>Adapt</a>
			</p>
		</section>
		<section class="card" aria-label=${anchorsTitle(user.anchors)}>
			<h2>${anchorsTitle(user.anchors)}</h2>
			<p class="hint">Chosen ${SOURCES[user.source] ?? `by ${user.source}`}.</p>
			<${Anchors} anchors=${user.anchors} detailed />
		</section>`;
}

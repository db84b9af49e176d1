// A user's items: what each of them teaches, and a form that adds some.
import { call, userPath, wasStopped } from '../api.js';
import { useBank } from './bank.js';
import { html, useEffect, useRef, useState } from './html.js';
import { Input, Notice, Says } from './widgets.js';
import { count, pieces } from './words.js';

const FEW = 5;
const TEACHES = { lesson: 'lesson', topics: 'topics only', too_short: 'too short' };

/** The user's newest items with what is known of each; `changed` is new whenever they are. */
export function Items({ id, many, changed }) {
	const [items, setItems] = useState(null);
	const [limit, setLimit] = useState(FEW);
	const [fault, setFault] = useState(null);
	useEffect(() => {
		const stop = new AbortController();
		call('GET', `${userPath(id)}/profile/items?limit=${limit}`, undefined, { signal: stop.signal })
			.then((told) => { setItems(told.items); setFault(null); }, (error) => wasStopped(error) || setFault(error));
		return () => stop.abort();
	}, [id, limit, changed]);
	const reasons = [...new Map((items ?? []).filter(({ reason }) => reason).map((item) => [item.teaches, item])).values()];
	return html`<section class="card" aria-label="Items">
		<h2>Items</h2>
		<${Notice} error=${fault} />
		${items && html`<ul class="items">${items.map(({ id: name, text, teaches }) => html`<li key=${name}>
				<p>${text}</p><span class=${`level ${teaches}`}>${TEACHES[teaches]}</span>
			</li>`)}</ul>
			${reasons.map(({ teaches, reason }) => html`<p key=${teaches} class="hint"><${Says} text=${reason} /></p>`)}
			${many > items.length && html`<button type="button" class="quiet" onClick=${() => setLimit(many)}>Show all ${count(many, 'item')}</button>`}`}
	</section>`;
}

export function AddItems({ id, onAdded }) {
	const [bank] = useBank();
	const here = useRef(true);
	useEffect(() => () => { here.current = false; }, []);
	const [typed, setTyped] = useState('');
	const [added, setAdded] = useState(null);
	const [fault, setFault] = useState(null);
	const [sending, setSending] = useState(false);
	const found = pieces(typed);
	async function add(event) {
		event.preventDefault();
		setSending(true);
		setFault(null);
		try {
			setAdded(await call('POST', `${userPath(id)}/profile/items`, { items: found }));
			setTyped('');
			if (here.current) onAdded();
		} catch (error) {
			setFault(error);
		}
		setSending(false);
	}
	return html`<form class="card" onSubmit=${add} aria-label="Add items">
		<h2>Add items</h2>
		<${Input} area rows="3" required label="What they have written" value=${typed} onValue=${setTyped}
			hint=${html`One item per line, or items separated by empty lines; or JSON objects
				${bank?.task && html`${' '}with <code>${bank.task.fields.join(', ')}</code>`}.`} />
		<div class="actions">
			<button type="submit" disabled=${sending || !found.length}>Add ${found.length ? count(found.length, 'item') : ''}</button>
			<p role="status">${added && `${count(added.changed, 'item')} changed, ${count(added.kept, 'item')} kept.`}</p>
		</div>
		<${Notice} error=${fault} />
	</form>`;
}

// Go: net/http and pgx with a pool of 20; one statement, and so one commit, for each order.
//
//	DATABASE_URL=postgresql://... PORT=8000 orders STATEMENT.sql
//
// The order is decoded strictly and validated, its money is counted in whole minor units, and the answer is the
// order as it was stored. The statement is prepared once on each connection.
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4/pgxpool"
)

const (
	poolConnections = 20
	bodyBytesMax    = 1 << 20
	storeSecondsMax = 30 * time.Second
	linesMax        = 2000
	currency        = "USD"
)

type itemIn struct {
	ItemID   string      `json:"item_id"`
	ItemName string      `json:"item_name"`
	Quantity int32       `json:"quantity"`
	Price    json.Number `json:"price"`
}

type orderIn struct {
	OrderID    string   `json:"order_id"`
	CustomerID string   `json:"customer_id"`
	Items      []itemIn `json:"items"`
}

type itemOut struct {
	Line       int         `json:"line"`
	ItemID     string      `json:"item_id"`
	ItemName   string      `json:"item_name"`
	Quantity   int32       `json:"quantity"`
	Price      json.Number `json:"price"`
	PriceMinor int64       `json:"price_minor"`
}

type orderOut struct {
	OrderID     string      `json:"order_id"`
	Status      string      `json:"status"`
	CustomerID  string      `json:"customer_id"`
	Currency    string      `json:"currency"`
	TotalAmount json.Number `json:"total_amount"`
	TotalMinor  int64       `json:"total_minor"`
	Items       []itemOut   `json:"items"`
	Version     int64       `json:"version"`
	CreatedAt   time.Time   `json:"created_at"`
	UpdatedAt   time.Time   `json:"updated_at"`
}

type placedData struct {
	CustomerID string `json:"customer_id"`
	Currency   string `json:"currency"`
	TotalMinor int64  `json:"total_minor"`
}

// refusal is what a client did wrong, as a sentence for it.
type refusal string

func (r refusal) Error() string { return string(r) }

// minor reads an amount with at most two digits after the point as whole minor units.
func minor(amount json.Number) (int64, error) {
	whole, part, _ := strings.Cut(amount.String(), ".")
	if len(part) > 2 {
		return 0, refusal("a price has at most two digits after the point")
	}
	found, err := strconv.ParseInt(whole+(part + "00")[:2], 10, 64)
	if err != nil || found < 0 || found > 1e13 {
		return 0, refusal("a price must be a plain amount, not below zero")
	}
	return found, nil
}

func amountOf(minor int64) json.Number {
	cents := strconv.FormatInt(minor%100, 10)
	if len(cents) < 2 {
		cents = "0" + cents
	}
	return json.Number(strconv.FormatInt(minor/100, 10) + "." + cents)
}

// newOrderID returns a UUIDv7 without its dashes: ids of one time lie together in the index.
func newOrderID(now time.Time) (string, error) {
	var id [16]byte
	if _, err := rand.Read(id[6:]); err != nil {
		return "", err
	}
	milliseconds := now.UnixMilli()
	for place := 5; place >= 0; place-- {
		id[place] = byte(milliseconds)
		milliseconds >>= 8
	}
	id[6] = id[6]&0x0f | 0x70
	id[8] = id[8]&0x3f | 0x80
	return "ORD-" + hex.EncodeToString(id[:]), nil
}

// accept checks an order and counts it up.
func accept(in *orderIn) (*orderOut, error) {
	if in.CustomerID == "" || len(in.CustomerID) > 128 || len(in.OrderID) > 64 {
		return nil, refusal("customer_id is required, and ids have their lengths")
	}
	if len(in.Items) == 0 || len(in.Items) > linesMax {
		return nil, refusal("an order has 1 to 2000 items")
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	out := &orderOut{OrderID: in.OrderID, Status: "pending", CustomerID: in.CustomerID, Currency: currency, Version: 1}
	out.CreatedAt, out.UpdatedAt, out.Items = now, now, make([]itemOut, 0, len(in.Items))
	for index, item := range in.Items {
		if item.ItemID == "" || item.ItemName == "" || item.Quantity < 1 || item.Quantity > 1_000_000 {
			return nil, refusal("an item has an id, a name and a quantity")
		}
		price, err := minor(item.Price)
		if err != nil {
			return nil, err
		}
		out.TotalMinor += price * int64(item.Quantity)
		out.Items = append(out.Items, itemOut{
			index + 1, item.ItemID, item.ItemName, item.Quantity, amountOf(price), price,
		})
	}
	out.TotalAmount = amountOf(out.TotalMinor)
	if out.OrderID == "" {
		id, err := newOrderID(now)
		if err != nil {
			return nil, err
		}
		out.OrderID = id
	}
	return out, nil
}

type service struct {
	pool      *pgxpool.Pool
	statement string
}

// store is not given up when the client leaves: that would cost its connection to the database.
func (s *service) store(order *orderOut) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeSecondsMax)
	defer cancel()
	count := len(order.Items)
	ids, names := make([]string, count), make([]string, count)
	quantities, prices := make([]int32, count), make([]int64, count)
	for index := range order.Items {
		item := &order.Items[index]
		ids[index], names[index] = item.ItemID, item.ItemName
		quantities[index], prices[index] = item.Quantity, item.PriceMinor
	}
	data, err := json.Marshal(placedData{order.CustomerID, order.Currency, order.TotalMinor})
	if err != nil {
		return err
	}
	_, err = s.pool.Exec(ctx, s.statement, order.OrderID, order.CustomerID, order.Currency, order.TotalMinor,
		order.CreatedAt, ids, names, quantities, prices, string(data))
	return err
}

func (s *service) place(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		refuse(w, http.StatusMethodNotAllowed, "orders are placed by POST")
		return
	}
	var in orderIn
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, bodyBytesMax))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&in); err != nil {
		refuse(w, http.StatusUnprocessableEntity, err.Error())
		return
	}
	order, err := accept(&in)
	if err == nil {
		err = s.store(order)
	}
	var said refusal
	var refused *pgconn.PgError
	switch {
	case err == nil:
	case errors.As(err, &said):
		refuse(w, http.StatusUnprocessableEntity, said.Error())
		return
	case errors.As(err, &refused) && refused.Code == "23505":
		refuse(w, http.StatusConflict, "there is an order of this id")
		return
	default:
		log.Print(err)
		refuse(w, http.StatusServiceUnavailable, "the order was not stored")
		return
	}
	answer(w, http.StatusCreated, order)
}

func refuse(w http.ResponseWriter, status int, why string) {
	answer(w, status, map[string]string{"error": why})
}

func answer(w http.ResponseWriter, status int, document any) {
	body, err := json.Marshal(document)
	if err != nil {
		log.Print(err)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

func main() {
	statement, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = poolConnections
	pool, err := pgxpool.ConnectConfig(context.Background(), config)
	if err != nil {
		log.Fatal(err)
	}
	s := &service{pool, string(statement)}
	http.HandleFunc("/orders", s.place)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
